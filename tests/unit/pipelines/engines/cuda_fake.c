/* A CUDA driver whose device is this machine's memory: enough of one for real bindings to call.
   Copies happen when a stream is waited for, as they may on a device. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700 };
enum { MOST = 64, DEVICE_BYTES = 1 << 20 };

typedef struct { void *to; const void *from; size_t size; } Copy;
typedef struct { Copy copies[MOST]; int count; } Work;
typedef struct { Work todo, recorded; int capturing; unsigned flags; } Stream;
typedef struct { Stream *stream; unsigned flags; } Event;

static __thread int contexts;
static size_t used, sizes;
static int failed;

void fake_fail(void) { failed = 1; } /* as after an illegal access: for good */

#define NEEDS_CONTEXT if (contexts < 1) return INVALID_CONTEXT
#define NEEDS_DEVICE NEEDS_CONTEXT; if (failed) return ILLEGAL_ADDRESS

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return SUCCESS; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Fake GPU", size); return SUCCESS; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = DEVICE_BYTES; return SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 9 : 0; /* COMPUTE_CAPABILITY_MAJOR, _MINOR */
  return SUCCESS;
}
int cuDeviceComputeCapability(int *major, int *minor, int device) { *major = 8; *minor = 9; return SUCCESS; }

int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &sizes; return SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }
int cuCtxPushCurrent_v2(void *context) { contexts++; return context == &sizes ? SUCCESS : INVALID_CONTEXT; }
int cuCtxPopCurrent_v2(void **context) { NEEDS_CONTEXT; contexts--; if (context) *context = &sizes; return SUCCESS; }
int cuCtxGetCurrent(void **context) { *context = contexts ? &sizes : NULL; return SUCCESS; }
int cuCtxGetDevice(int *device) { NEEDS_CONTEXT; *device = 0; return SUCCESS; }
int cuCtxGetApiVersion(void *context, unsigned *version) { *version = 13000; return SUCCESS; }

int cuMemAlloc_v2(uintptr_t *pointer, size_t size) {
  NEEDS_CONTEXT;
  if (used + size > DEVICE_BYTES) return OUT_OF_MEMORY;
  size_t *block = malloc(sizeof(size_t) * 2 + size);
  used += block[0] = size;
  *pointer = (uintptr_t)(block + 2);
  return SUCCESS;
}
int cuMemFree_v2(uintptr_t pointer) {
  NEEDS_CONTEXT;
  size_t *block = (size_t *)pointer - 2;
  used -= block[0];
  free(block);
  return SUCCESS;
}
int cuMemHostAlloc(void **memory, size_t size, unsigned flags) { NEEDS_CONTEXT; *memory = malloc(size); return SUCCESS; }
int cuMemAllocHost_v2(void **memory, size_t size) { return cuMemHostAlloc(memory, size, 0); }
int cuMemFreeHost(void *memory) { NEEDS_CONTEXT; free(memory); return SUCCESS; }

int cuStreamCreate(Stream **stream, unsigned flags) {
  NEEDS_DEVICE;
  *stream = calloc(1, sizeof(Stream));
  (*stream)->flags = flags;
  return SUCCESS;
}
int cuStreamDestroy_v2(Stream *stream) { NEEDS_CONTEXT; free(stream); return SUCCESS; }
int cuEventCreate(Event **event, unsigned flags) {
  NEEDS_CONTEXT;
  *event = calloc(1, sizeof(Event));
  (*event)->flags = flags;
  return SUCCESS;
}
int cuEventDestroy_v2(Event *event) { NEEDS_CONTEXT; free(event); return SUCCESS; }
int cuEventRecord(Event *event, Stream *stream) { NEEDS_CONTEXT; event->stream = stream; return SUCCESS; }
int cuEventSynchronize(Event *event) {
  NEEDS_DEVICE;
  if (event->flags != 3 || event->stream->flags != 1) return INVALID_VALUE; /* sleeping, untimed; non-blocking */
  Work *todo = &event->stream->todo;
  for (int i = 0; i < todo->count; i++) memcpy(todo->copies[i].to, todo->copies[i].from, todo->copies[i].size);
  todo->count = 0;
  return SUCCESS;
}

static int put(Stream *stream, void *to, const void *from, size_t size) {
  NEEDS_CONTEXT;
  Work *work = stream->capturing ? &stream->recorded : &stream->todo;
  if (work->count == MOST) return OUT_OF_MEMORY;
  work->copies[work->count++] = (Copy){to, from, size};
  return SUCCESS;
}
int cuMemcpyHtoDAsync_v2(uintptr_t to, const void *from, size_t size, Stream *stream) { return put(stream, (void *)to, from, size); }
int cuMemcpyDtoHAsync_v2(void *to, uintptr_t from, size_t size, Stream *stream) { return put(stream, to, (void *)from, size); }

int cuStreamBeginCapture_v2(Stream *stream, int mode) {
  if (stream->capturing || mode != 1) return INVALID_VALUE; /* of this thread alone */
  stream->capturing = 1;
  stream->recorded.count = 0;
  return SUCCESS;
}
int cuStreamEndCapture(Stream *stream, Work **graph) {
  if (!stream->capturing) return INVALID_VALUE;
  stream->capturing = 0;
  *graph = malloc(sizeof(Work));
  **graph = stream->recorded;
  return SUCCESS;
}
int cuGraphInstantiateWithFlags(Work **executable, Work *graph, unsigned long long flags) {
  *executable = malloc(sizeof(Work));
  **executable = *graph;
  return SUCCESS;
}
int cuGraphLaunch(Work *executable, Stream *stream) {
  for (int i = 0; i < executable->count; i++) {
    Copy copy = executable->copies[i];
    int status = put(stream, copy.to, copy.from, copy.size);
    if (status) return status;
  }
  return SUCCESS;
}
int cuGraphDestroy(Work *graph) { free(graph); return SUCCESS; }
int cuGraphExecDestroy(Work *executable) { free(executable); return SUCCESS; }

int cuGetErrorName(int status, const char **name) {
  *name = status == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
    : status == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_INVALID_VALUE";
  return SUCCESS;
}
int cuGetErrorString(int status, const char **text) {
  *text = status == OUT_OF_MEMORY ? "out of memory" : "invalid argument";
  return SUCCESS;
}

/* The vendor's own bindings ask for functions by name, without the version that some have at their end. */
int cuGetProcAddress_v2(const char *symbol, void **found, int version, uint64_t flags, int *status) {
  static const char *endings[] = {"_v2", ""};
  char name[128];
  Dl_info here;
  dladdr((void *)cuInit, &here);
  void *self = dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  for (int i = 0; i < 2; i++) {
    strcpy(name, symbol);
    if ((*found = dlsym(self, strcat(name, endings[i])))) {
      if (status) *status = 0;
      return SUCCESS;
    }
  }
  if (status) *status = 1;
  return NOT_FOUND;
}
int cuGetProcAddress(const char *symbol, void **found, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, found, version, flags, NULL);
}
