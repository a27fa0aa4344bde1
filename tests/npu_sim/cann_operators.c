/* The stand-in for libacl_op_compiler: the few kernels that torch_npu's C++ calls by itself.
 *
 * Python code computes through cpu_kernels.py. What is left are the tensors that c10d fills on the device for a
 * barrier. Any other kernel fails loudly: it must never look as if it had computed.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"

struct aclDataBuffer {
    void *data;
    size_t bytes;
};

struct aclTensorDesc {
    aclDataType type;
};

aclDataBuffer *aclCreateDataBuffer(void *data, size_t bytes) {
    aclDataBuffer *buffer = malloc(sizeof *buffer);
    *buffer = (aclDataBuffer){data, bytes};
    return buffer;
}

aclError aclDestroyDataBuffer(const aclDataBuffer *buffer) {
    free((void *)buffer);
    return ACL_SUCCESS;
}

aclTensorDesc *aclCreateTensorDesc(aclDataType type, int dimensions, const int64_t *sizes, aclFormat format) {
    aclTensorDesc *description = malloc(sizeof *description);
    description->type = type;
    return description;
}

void aclDestroyTensorDesc(const aclTensorDesc *description) { free((void *)description); }

/* One element of value 1, and its size in bytes. */
static size_t one_of(aclDataType type, void *one) {
    switch (type) {
        case ACL_FLOAT: return memcpy(one, &(float){1}, 4), 4;
        case ACL_FLOAT16: return memcpy(one, &(uint16_t){0x3c00}, 2), 2;
        case ACL_BF16: return memcpy(one, &(uint16_t){0x3f80}, 2), 2;
        case ACL_INT32: return memcpy(one, &(int32_t){1}, 4), 4;
        case ACL_INT64: return memcpy(one, &(int64_t){1}, 8), 8;
        case ACL_INT8:
        case ACL_UINT8:
        case ACL_BOOL: return memcpy(one, &(uint8_t){1}, 1), 1;
        default: return 0;
    }
}

static void fill(const aclDataBuffer *output, const void *element, size_t size) {
    for (size_t at = 0; at + size <= output->bytes; at += size) memcpy((char *)output->data + at, element, size);
}

aclError aclopCompileAndExecuteV2(const char *name, int input_count, aclTensorDesc *input_types[],
                                  aclDataBuffer *inputs[], int output_count, aclTensorDesc *output_types[],
                                  aclDataBuffer *outputs[], aclopAttr *attributes, aclopEngineType engine,
                                  aclopCompileType compile, const char *path, aclrtStream stream) {
    uint64_t one = 0;
    size_t size = one_of(output_types[0]->type, &one);
    if (size == 0) name = "of this type";
    if (strcmp(name, "ZerosLike") == 0) return memset(outputs[0]->data, 0, outputs[0]->bytes), ACL_SUCCESS;
    if (strcmp(name, "OnesLike") == 0) return fill(outputs[0], &one, size), ACL_SUCCESS;
    if (strcmp(name, "Fill") == 0 && inputs[1]->bytes >= size) return fill(outputs[0], inputs[1]->data, size), ACL_SUCCESS;
    fprintf(stderr, "npu-sim: there is no kernel %s\n", name);
    return ACL_ERROR_OP_NOT_FOUND;
}

aclError aclopCompileAndExecute(const char *name, int input_count, const aclTensorDesc *const input_types[],
                                const aclDataBuffer *const inputs[], int output_count,
                                const aclTensorDesc *const output_types[], aclDataBuffer *const outputs[],
                                const aclopAttr *attributes, aclopEngineType engine, aclopCompileType compile,
                                const char *path, aclrtStream stream) {
    return aclopCompileAndExecuteV2(name, input_count, (aclTensorDesc **)input_types, (aclDataBuffer **)inputs,
                                    output_count, (aclTensorDesc **)output_types, (aclDataBuffer **)outputs,
                                    (aclopAttr *)attributes, engine, compile, path, stream);
}
