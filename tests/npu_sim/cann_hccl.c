/* The stand-in for libhccl: collectives between processes of one host, through POSIX shared memory.
 *
 * A communicator is one shared segment: a header with a barrier, then a slot for each rank. Every collective has the
 * same four steps, repeated for each piece that fits a slot:
 *
 *     copy my piece into my slot  |  barrier: all pieces are there  |  read the others' slots  |  barrier: all have read
 *
 * The real HCCL returns at once and fails later, on the stream; here a collective is done, or has failed, when it
 * returns. Sums are taken in rank order, so all ranks get the same bits. HCCL_CONNECT_TIMEOUT and HCCL_EXEC_TIMEOUT
 * bound the waits, and a wait that ends so has HCCL's code and the text that CANN has for it.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "cann_sim.h"

/* The wheel's HCCL header is C++ only. What is needed of it, with its names and values: */
typedef enum {
    HCCL_SUCCESS = 0,
    HCCL_E_MEMORY = 3,
    HCCL_E_NOT_SUPPORT = 5,
    HCCL_E_SYSCALL = 8,
    HCCL_E_TIMEOUT = 9,
} HcclResult;

typedef enum { HCCL_REDUCE_SUM, HCCL_REDUCE_PROD, HCCL_REDUCE_MAX, HCCL_REDUCE_MIN } HcclReduceOp;

typedef enum {
    HCCL_DATA_TYPE_INT8,
    HCCL_DATA_TYPE_INT16,
    HCCL_DATA_TYPE_INT32,
    HCCL_DATA_TYPE_FP16,
    HCCL_DATA_TYPE_FP32,
    HCCL_DATA_TYPE_INT64,
    HCCL_DATA_TYPE_UINT64,
    HCCL_DATA_TYPE_UINT8,
    HCCL_DATA_TYPE_UINT16,
    HCCL_DATA_TYPE_UINT32,
    HCCL_DATA_TYPE_FP64,
    HCCL_DATA_TYPE_BFP16,
} HcclDataType;

typedef struct {
    char internal[4108];
} HcclRootInfo;

/* Its beginning: more fields follow that are not read here. */
typedef struct {
    char reserved[24];
    uint32_t hcclBufferSize; /* MB */
} HcclCommConfig;

enum { HCCL_COMM_CONFIG_BUFFER_SIZE = 0 };

typedef void *HcclComm, *aclrtStream;

#define SLOT_BYTES ((size_t)8 << 20)
#define NAME_BYTES 64
#define DEFAULT_CONNECT_TIMEOUT_S 120
#define DEFAULT_EXEC_TIMEOUT_S 1836

typedef struct {
    _Atomic uint32_t attached, arrived, generation;
    char to_cache_line[52];
} Header;

typedef struct {
    uint32_t rank, ranks;
    Header *header;
    char *slots;
    char name[NAME_BYTES];
    HcclResult error;
} Communicator;

/* ---- waiting ------------------------------------------------------------------------------------------------ */

static double now_s(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static double seconds_from(const char *variable, double otherwise) {
    const char *given = getenv(variable);
    double seconds = given ? atof(given) : 0;
    return seconds > 0 ? seconds : otherwise;
}

static void nap(void) { nanosleep(&(struct timespec){0, 50000}, NULL); }

/* Wait until a counter has another value than `old`; false when the time is up. */
static bool wait_for_change(_Atomic uint32_t *counter, uint32_t old, double limit_s) {
    for (double start = now_s(); atomic_load(counter) == old; nap()) {
        if (now_s() - start > limit_s) return false;
    }
    return true;
}

/* The rank NPU_SIM_SILENT_RANK has a card that stops answering: it never joins a collective. */
static bool is_silent(const Communicator *comm) {
    const char *silent = getenv("NPU_SIM_SILENT_RANK");
    return silent && (uint32_t)atoi(silent) == comm->rank;
}

static HcclResult barrier(Communicator *comm) {
    double limit_s = seconds_from("HCCL_EXEC_TIMEOUT", DEFAULT_EXEC_TIMEOUT_S);
    if (is_silent(comm)) {
        for (double start = now_s(); now_s() - start < 4 * limit_s; nap()) continue;
        return comm->error = HCCL_E_TIMEOUT;
    }
    uint32_t generation = atomic_load(&comm->header->generation);
    if (atomic_fetch_add(&comm->header->arrived, 1) + 1 == comm->ranks) {
        atomic_store(&comm->header->arrived, 0);
        atomic_fetch_add(&comm->header->generation, 1);
        return HCCL_SUCCESS;
    }
    if (wait_for_change(&comm->header->generation, generation, limit_s)) return HCCL_SUCCESS;
    sim_error("EI0002: The wait execution of the Notify register times out. Reason: The Notify register has not "
              "received the Notify record from a remote rank.");
    return comm->error = HCCL_E_TIMEOUT;
}

/* ---- communicators ------------------------------------------------------------------------------------------ */

HcclResult HcclGetRootInfo(HcclRootInfo *root) {
    static int made;
    memset(root, 0, sizeof *root);
    snprintf((char *)root, NAME_BYTES, "/npu_sim_%d_%d_%ld", getpid(), made++, (long)time(NULL));
    return HCCL_SUCCESS;
}

static HcclResult map_segment(Communicator *comm) {
    size_t bytes = sizeof(Header) + comm->ranks * SLOT_BYTES;
    int file = shm_open(comm->name, O_RDWR | O_CREAT, 0600);
    if (file < 0) return HCCL_E_SYSCALL;
    void *segment = ftruncate(file, (off_t)bytes) ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (segment == MAP_FAILED) return HCCL_E_MEMORY;
    comm->header = segment;
    comm->slots = (char *)segment + sizeof(Header);
    return HCCL_SUCCESS;
}

/* All ranks attach within HCCL_CONNECT_TIMEOUT; then nobody needs the segment's name any more. */
static HcclResult connect_all(Communicator *comm) {
    double limit_s = seconds_from("HCCL_CONNECT_TIMEOUT", DEFAULT_CONNECT_TIMEOUT_S);
    uint32_t attached = atomic_fetch_add(&comm->header->attached, 1) + 1;
    while (attached < comm->ranks) {
        if (!wait_for_change(&comm->header->attached, attached, limit_s)) {
            shm_unlink(comm->name);
            sim_error("EI0006: Getting socket times out. Reason: Remote Rank did not send the data in time.");
            return HCCL_E_TIMEOUT;
        }
        attached = atomic_load(&comm->header->attached);
    }
    shm_unlink(comm->name);
    return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t ranks, const HcclRootInfo *root, uint32_t rank, HcclComm *made) {
    Communicator *comm = calloc(1, sizeof *comm);
    comm->rank = rank;
    comm->ranks = ranks;
    snprintf(comm->name, NAME_BYTES, "%s", (const char *)root);
    sim_log("HcclCommInit ranks=%u rank=%u", ranks, rank);
    HcclResult result = map_segment(comm);
    if (result == HCCL_SUCCESS) result = connect_all(comm);
    *made = comm;
    return result;
}

HcclResult HcclCommInitRootInfoConfig(uint32_t ranks, const HcclRootInfo *root, uint32_t rank,
                                      const HcclCommConfig *config, HcclComm *made) {
    sim_log("HcclCommConfig hccl_buffer_size=%u", config->hcclBufferSize);
    return HcclCommInitRootInfo(ranks, root, rank, made);
}

/* Only the first capability, the size of the buffers: the one option that the product sets. */
uint32_t HcclGetCommConfigCapability(void) { return HCCL_COMM_CONFIG_BUFFER_SIZE + 1; }

HcclResult HcclCommDestroy(HcclComm handle) {
    Communicator *comm = handle;
    if (comm == NULL) return HCCL_SUCCESS;
    munmap(comm->header, sizeof(Header) + comm->ranks * SLOT_BYTES);
    free(comm);
    return HCCL_SUCCESS;
}

HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult *error) {
    *error = comm ? ((Communicator *)comm)->error : HCCL_SUCCESS;
    return HCCL_SUCCESS;
}

HcclResult HcclGetCommName(HcclComm comm, char *name) {
    strcpy(name, ((Communicator *)comm)->name + 1); /* without the slash of the segment's name */
    return HCCL_SUCCESS;
}

/* ---- arithmetic --------------------------------------------------------------------------------------------- */

static size_t size_of(HcclDataType type) {
    switch (type) {
        case HCCL_DATA_TYPE_INT8:
        case HCCL_DATA_TYPE_UINT8: return 1;
        case HCCL_DATA_TYPE_INT16:
        case HCCL_DATA_TYPE_UINT16:
        case HCCL_DATA_TYPE_FP16:
        case HCCL_DATA_TYPE_BFP16: return 2;
        case HCCL_DATA_TYPE_INT32:
        case HCCL_DATA_TYPE_UINT32:
        case HCCL_DATA_TYPE_FP32: return 4;
        case HCCL_DATA_TYPE_INT64:
        case HCCL_DATA_TYPE_UINT64:
        case HCCL_DATA_TYPE_FP64: return 8;
        default: return 0;
    }
}

static float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* Round half to even, as torch does. */
static uint16_t to_bf16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    return (uint16_t)((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

#define COMBINE(a, b)                         \
    (op == HCCL_REDUCE_SUM    ? (a) + (b)     \
     : op == HCCL_REDUCE_PROD ? (a) * (b)     \
     : op == HCCL_REDUCE_MAX  ? (a) > (b) ? (a) : (b) \
                              : (a) < (b) ? (a) : (b))

#define REDUCE_AS(T)                                                                    \
    for (uint64_t i = 0; i < count; i++) {                                              \
        ((T *)total)[i] = (T)COMBINE(((T *)total)[i], ((const T *)part)[i]);            \
    }                                                                                   \
    return HCCL_SUCCESS

/* total[i] = total[i] op part[i] */
static HcclResult reduce(void *total, const void *part, uint64_t count, HcclDataType type, HcclReduceOp op) {
    switch (type) {
        case HCCL_DATA_TYPE_INT8: REDUCE_AS(int8_t);
        case HCCL_DATA_TYPE_UINT8: REDUCE_AS(uint8_t);
        case HCCL_DATA_TYPE_INT32: REDUCE_AS(int32_t);
        case HCCL_DATA_TYPE_INT64: REDUCE_AS(int64_t);
        case HCCL_DATA_TYPE_FP16: REDUCE_AS(_Float16);
        case HCCL_DATA_TYPE_FP32: REDUCE_AS(float);
        case HCCL_DATA_TYPE_BFP16:
            for (uint64_t i = 0; i < count; i++) {
                float a = from_bf16(((uint16_t *)total)[i]), b = from_bf16(((const uint16_t *)part)[i]);
                ((uint16_t *)total)[i] = to_bf16(COMBINE(a, b));
            }
            return HCCL_SUCCESS;
        default: return HCCL_E_NOT_SUPPORT;
    }
}

/* ---- collectives -------------------------------------------------------------------------------------------- */

#define TRY(call)                                        \
    do {                                                 \
        HcclResult tried = (call);                       \
        if (tried != HCCL_SUCCESS) return tried;         \
    } while (0)

static char *slot_of(const Communicator *comm, uint32_t rank) { return comm->slots + rank * SLOT_BYTES; }

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

HcclResult HcclAllReduce(void *input, void *output, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm handle,
                         aclrtStream stream) {
    Communicator *comm = handle;
    size_t size = size_of(type);
    if (size == 0) return HCCL_E_NOT_SUPPORT;
    for (uint64_t done = 0, piece; done < count; done += piece) {
        piece = smaller(count - done, SLOT_BYTES / size);
        char *target = (char *)output + done * size;
        memcpy(slot_of(comm, comm->rank), (char *)input + done * size, piece * size);
        TRY(barrier(comm));
        memcpy(target, slot_of(comm, 0), piece * size);
        for (uint32_t rank = 1; rank < comm->ranks; rank++) TRY(reduce(target, slot_of(comm, rank), piece, type, op));
        TRY(barrier(comm));
    }
    return HCCL_SUCCESS;
}

HcclResult HcclAllGather(void *input, void *output, uint64_t count, HcclDataType type, HcclComm handle,
                         aclrtStream stream) {
    Communicator *comm = handle;
    size_t size = size_of(type);
    if (size == 0) return HCCL_E_NOT_SUPPORT;
    for (uint64_t done = 0, piece; done < count; done += piece) {
        piece = smaller(count - done, SLOT_BYTES / size);
        memcpy(slot_of(comm, comm->rank), (char *)input + done * size, piece * size);
        TRY(barrier(comm));
        for (uint32_t rank = 0; rank < comm->ranks; rank++) {
            memcpy((char *)output + (rank * count + done) * size, slot_of(comm, rank), piece * size);
        }
        TRY(barrier(comm));
    }
    return HCCL_SUCCESS;
}

HcclResult HcclBroadcast(void *buffer, uint64_t count, HcclDataType type, uint32_t root, HcclComm handle,
                         aclrtStream stream) {
    Communicator *comm = handle;
    size_t size = size_of(type);
    if (size == 0) return HCCL_E_NOT_SUPPORT;
    for (uint64_t done = 0, piece; done < count; done += piece) {
        piece = smaller(count - done, SLOT_BYTES / size);
        char *place = (char *)buffer + done * size;
        if (comm->rank == root) memcpy(slot_of(comm, root), place, piece * size);
        TRY(barrier(comm));
        if (comm->rank != root) memcpy(place, slot_of(comm, root), piece * size);
        TRY(barrier(comm));
    }
    return HCCL_SUCCESS;
}
