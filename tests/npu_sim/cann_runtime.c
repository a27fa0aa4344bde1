/* The stand-in for libascendcl: a card whose memory is the host's and whose streams have always finished already.
 *
 * Work is done when a function returns, so streams and events carry no state: an address that is not NULL is all that
 * torch_npu asks of them. Functions that merely have to succeed are not here: stubs.py makes one for every symbol that
 * the wheel needs and these files do not define. Prototypes are checked against the headers that the wheel carries.
 */
#include "cann_sim.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"

/* ---- what a test may set, see and read ---------------------------------------------------------------------- */

void sim_log(const char *format, ...) {
    const char *folder = getenv("NPU_SIM_LOG"), *rank = getenv("RANK");
    if (folder == NULL) return;
    char path[512];
    snprintf(path, sizeof path, "%s/calls_%s.txt", folder, rank ? rank : "0");
    FILE *file = fopen(path, "a");
    if (file == NULL) return;
    va_list arguments;
    va_start(arguments, format);
    vfprintf(file, format, arguments);
    va_end(arguments);
    fputc('\n', file);
    fclose(file);
}

static char last_error[256];

void sim_error(const char *text) { snprintf(last_error, sizeof last_error, "%s", text); }

const char *aclGetRecentErrMsg(void) { return last_error; }

/* ---- devices ------------------------------------------------------------------------------------------------ */

#define NONE (-1)
static _Thread_local int32_t current_device = NONE; /* as in CANN, each thread has its own */

aclError aclrtGetDeviceCount(uint32_t *count) {
    const char *given = getenv("NPU_SIM_DEVICES");
    *count = given ? (uint32_t)atoi(given) : 0;
    return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t device) {
    if (device != current_device) sim_log("aclrtSetDevice %d", device); /* torch_npu sets the same one many times */
    current_device = device;
    return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t *device) {
    if (current_device == NONE) return ACL_ERROR_RT_CONTEXT_NULL;
    *device = current_device;
    return ACL_SUCCESS;
}

const char *aclrtGetSocName(void) { return "Ascend910B4"; }

aclError aclrtGetLogicDevIdByUserDevId(const int32_t user_device, int32_t *const logical_device) {
    *logical_device = user_device;
    return ACL_SUCCESS;
}

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    *flags = 0;
    *active = 1;
    return ACL_SUCCESS;
}

aclError aclrtGetCurrentContext(aclrtContext *context) {
    static int the_context;
    *context = &the_context;
    return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t *can_access, int32_t device, int32_t peer) {
    *can_access = 1;
    return ACL_SUCCESS;
}

aclError aclSetCompileopt(aclCompileOpt option, const char *value) {
    if (option == ACL_OP_JIT_COMPILE) sim_log("aclSetCompileopt ACL_OP_JIT_COMPILE %s", value);
    return ACL_SUCCESS;
}

/* No version can be read: torch_npu then takes CANN for one that has no optional feature. */
aclError aclsysGetCANNVersion(aclCANNPackageName name, aclCANNPackageVersion *version) { return ACL_ERROR_INVALID_PARAM; }

/* ---- memory: the host's ------------------------------------------------------------------------------------- */

#define ALIGNMENT 512 /* of the real allocator; kernels rely on it, and so does the size of torch_npu's blocks */
#define GIB ((size_t)1 << 30)

static aclError allocate(void **pointer, size_t size) {
    return posix_memalign(pointer, ALIGNMENT, size ? size : ALIGNMENT) ? ACL_ERROR_RT_MEMORY_ALLOCATION : ACL_SUCCESS;
}

aclError aclrtMalloc(void **pointer, size_t size, aclrtMemMallocPolicy policy) { return allocate(pointer, size); }

aclError aclrtMallocAlign32(void **pointer, size_t size, aclrtMemMallocPolicy policy) { return allocate(pointer, size); }

aclError aclrtMallocHost(void **pointer, size_t size) { return allocate(pointer, size); }

aclError aclrtFree(void *pointer) {
    free(pointer);
    return ACL_SUCCESS;
}

aclError aclrtFreeHost(void *pointer) { return aclrtFree(pointer); }

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t count, aclrtMemcpyKind kind) {
    memmove(to, from, count);
    return ACL_SUCCESS;
}

aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t count, aclrtMemcpyKind kind,
                          aclrtStream stream) {
    return aclrtMemcpy(to, room, from, count, kind);
}

aclError aclrtMemset(void *to, size_t room, int32_t value, size_t count) {
    memset(to, value, count);
    return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t count, aclrtStream stream) {
    return aclrtMemset(to, room, value, count);
}

/* Answers as a card of 32 GB does; nothing here ever runs out. */
aclError aclrtGetMemInfo(aclrtMemAttr attribute, size_t *available, size_t *total) {
    *total = 32 * GIB;
    *available = 30 * GIB;
    return ACL_SUCCESS;
}

/* ---- streams and events: always finished -------------------------------------------------------------------- */

static aclError new_handle(void **handle) {
    *handle = malloc(1);
    return *handle ? ACL_SUCCESS : ACL_ERROR_RT_MEMORY_ALLOCATION;
}

aclError aclrtCreateStream(aclrtStream *stream) { return new_handle(stream); }

aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flag) { return new_handle(stream); }

aclError aclrtCreateEvent(aclrtEvent *event) { return new_handle(event); }

aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag) { return new_handle(event); }

aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag) { return new_handle(event); }

aclError aclrtCtxGetCurrentDefaultStream(aclrtStream *stream) {
    static int the_stream;
    *stream = &the_stream;
    return ACL_SUCCESS;
}

aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status) {
    *status = ACL_STREAM_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

aclError aclrtStreamGetId(aclrtStream stream, int32_t *id) {
    *id = 1;
    return ACL_SUCCESS;
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
    *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status) {
    *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

aclError aclrtEventElapsedTime(float *milliseconds, aclrtEvent start, aclrtEvent end) {
    *milliseconds = 0;
    return ACL_SUCCESS;
}

aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) {
    *value = 0;
    return ACL_SUCCESS;
}

aclError aclrtGetStreamOverflowSwitch(aclrtStream stream, uint32_t *flag) {
    *flag = 0;
    return ACL_SUCCESS;
}
