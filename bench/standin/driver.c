/* A libcuda that runs nothing. Triton's own driver loads it, builds its real launchers and calls it
   as it would call NVIDIA's. Every launch and every tensor map is checked against what a GPU takes
   and written down: its grid, its shared memory, its stream and the bytes of its arguments. */

#include "cuda.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
enum { MAX_ARGUMENTS = 128 };

typedef struct {
  char name[256];
  int count;
  int sizes[MAX_ARGUMENTS];
} Function;

typedef struct {
  char *bytes;
  size_t length, capacity;
} Text;

static int capability = 90, processors = 132, shared_bytes = 232448, writing = 0;
static long launches = 0;
static Text written, faults;
static char reason[512] = "no error";

static void append(Text *text, const char *format, ...) {
  for (;;) {
    va_list values;
    va_start(values, format);
    size_t room = text->capacity - text->length;
    int needed = vsnprintf(text->bytes ? text->bytes + text->length : NULL, room, format, values);
    va_end(values);
    if ((size_t)needed < room) {
      text->length += needed;
      return;
    }
    text->capacity = 2 * text->capacity + needed + 4096;
    text->bytes = realloc(text->bytes, text->capacity);
  }
}

static CUresult refuse(const char *what, const char *why) {
  snprintf(reason, sizeof reason, "%s: %s", what, why);
  append(&faults, "%s\n", reason);
  return CUDA_ERROR_INVALID_VALUE;
}

/* ---- for the Python side ---- */

EXPORT void standin_become(int new_capability, int new_processors, int new_shared) {
  capability = new_capability, processors = new_processors, shared_bytes = new_shared;
}
EXPORT void standin_write(int on) { writing = on; }
EXPORT long standin_launches(void) { return launches; }
EXPORT const char *standin_written(void) { return written.bytes ? written.bytes : ""; }
EXPORT const char *standin_faults(void) { return faults.bytes ? faults.bytes : ""; }
EXPORT void standin_forget(void) {
  written.length = faults.length = 0;
  launches = 0;
  append(&written, "%s", "");
  append(&faults, "%s", "");
}

/* ---- devices and contexts ---- */

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13010, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = reason, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability / 10; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability % 10; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = processors; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 49152; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_bytes; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_bytes + 1024; break;
  default: *value = 65536;
  }
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 1, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return *context = (CUcontext)1, CUDA_SUCCESS;
}
CUresult cuStreamGetCtx(CUstream stream, CUcontext *context) {
  return *context = (CUcontext)1, CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)data = pointer, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction f, const CUlaunchConfig *config) {
  return *count = 1, CUDA_SUCCESS;
}

/* ---- modules: a cubin says how large the arguments of its kernel are ---- */

typedef struct {
  unsigned char ident[16];
  unsigned short type, machine;
  unsigned version;
  unsigned long long entry, program_headers, section_headers;
  unsigned flags;
  unsigned short size, program_size, program_count, section_size, section_count, names;
} Elf;

typedef struct {
  unsigned name, type;
  unsigned long long flags, address, offset, size;
  unsigned link, info;
  unsigned long long alignment, entry_size;
} Section;

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  return *module = (CUmodule)image, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *result, CUmodule module, const char *name) {
  const char *image = (const char *)module;
  const Elf *elf = (const Elf *)image;
  const Section *sections = (const Section *)(image + elf->section_headers);
  Function *function = calloc(1, sizeof *function);
  char wanted[300];
  snprintf(function->name, sizeof function->name, "%s", name);
  snprintf(wanted, sizeof wanted, ".nv.info.%s", name);
  for (int i = 0; i < elf->section_count; i++) {
    if (strcmp(image + sections[elf->names].offset + sections[i].name, wanted)) continue;
    const unsigned char *at = (const unsigned char *)image + sections[i].offset;
    const unsigned char *end = at + sections[i].size;
    while (at + 4 <= end) { /* format, attribute, a value or the size of what follows */
      unsigned short size = at[2] | at[3] << 8;
      if (at[0] == 4 && at[1] == 0x17) { /* an argument: index, ordinal and offset, size << 18 */
        unsigned short ordinal;
        unsigned last;
        memcpy(&ordinal, at + 8, sizeof ordinal);
        memcpy(&last, at + 12, sizeof last);
        if (ordinal < MAX_ARGUMENTS) {
          function->sizes[ordinal] = last >> 18;
          if (ordinal >= function->count) function->count = ordinal + 1;
        }
      }
      at += at[0] == 4 ? 4 + size : 4;
    }
  }
  *result = (CUfunction)function;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }

/* ---- launches and tensor maps ---- */

static void write_down(const CUlaunchConfig *c, const Function *function, void **arguments) {
  append(&written, "%s %u,%u,%u %u %u %llu", function->name, c->gridDimX, c->gridDimY, c->gridDimZ,
         c->blockDimX, c->sharedMemBytes, (unsigned long long)c->hStream);
  for (int i = 0; i < function->count; i++) {
    append(&written, " ");
    for (int byte = function->sizes[i] - 1; byte >= 0; byte--)
      append(&written, "%02x", ((unsigned char *)arguments[i])[byte]);
  }
  append(&written, "\n");
}

#undef cuLaunchKernelEx
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **arguments, void **extra) {
  const Function *function = (const Function *)f;
  char why[128];
  launches++;
  if (!c->gridDimX || !c->gridDimY || !c->gridDimZ || c->gridDimX > 0x7fffffffu ||
      c->gridDimY > 65535 || c->gridDimZ > 65535) {
    snprintf(why, sizeof why, "grid (%u, %u, %u)", c->gridDimX, c->gridDimY, c->gridDimZ);
    return refuse(function->name, why);
  }
  if ((long long)c->sharedMemBytes > shared_bytes) {
    snprintf(why, sizeof why, "%u bytes of shared memory of %d", c->sharedMemBytes, shared_bytes);
    return refuse(function->name, why);
  }
  if (writing) write_down(c, function, arguments);
  return CUDA_SUCCESS;
}

#undef cuTensorMapEncodeTiled
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *address, const cuuint64_t *dims, const cuuint64_t *strides,
                                const cuuint32_t *box, const cuuint32_t *element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const unsigned bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const unsigned spans[] = {0, 32, 64, 128};
  const char *what = "tensor map";
  if (type >= sizeof bytes / sizeof *bytes) return refuse(what, "dtype");
  if (rank < 1 || rank > 5) return refuse(what, "rank");
  if ((size_t)address % 16) return refuse(what, "address is not a multiple of 16");
  unsigned size = bytes[type], inner = box[0] * size;
  for (unsigned i = 0; i < rank; i++) {
    if (dims[i] < 1 || dims[i] > 1ull << 32) return refuse(what, "dimension");
    if (box[i] < 1 || box[i] > 256) return refuse(what, "box is not in 1..256");
    if (element_strides[i] != 1) return refuse(what, "element stride");
    if (i + 1 == rank) continue;
    if (strides[i] % 16 || strides[i] >= 1ull << 40) return refuse(what, "stride");
    if (strides[i] < dims[0] * size) return refuse(what, "rows overlap");
  }
  if (inner % 16) return refuse(what, "row of the box is not a multiple of 16 bytes");
  if (swizzle > 3) return refuse(what, "swizzle");
  if (spans[swizzle] && inner > spans[swizzle]) return refuse(what, "box is wider than its swizzle");
  /* What compares maps, in place of what a GPU would read. */
  unsigned long long words[16] = {(size_t)address, type, rank, swizzle, promotion, fill, interleave};
  for (unsigned i = 0; i < rank && i < 3; i++) {
    words[7 + i] = dims[i], words[10 + i] = box[i];
    if (i + 1 < rank) words[13 + i] = strides[i];
  }
  memset(map, 0, sizeof *map);
  memcpy(map, words, sizeof words);
  return CUDA_SUCCESS;
}
