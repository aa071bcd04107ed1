/* dlpack_abi.h - the structures of DLPack, as far as this binding reads and writes them.
 *
 * Layouts and constants are those of the DLPack specification (https://dmlc.github.io/dlpack,
 * dlpack.h of versions 1.0 to 1.3), which keeps them for every version with major number 1.  Names
 * are ours; nothing here depends on another library's header.
 */
#ifndef PSB_DLPACK_ABI_H
#define PSB_DLPACK_ABI_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

enum { DL_MAJOR = 1, DL_MINOR = 3 };

enum dl_device_type {
  DL_CPU = 1,
  DL_CUDA = 2,
  DL_CUDA_HOST = 3, /* pinned */
  DL_OPENCL = 4,
  DL_VULKAN = 7,
  DL_METAL = 8,
  DL_ROCM = 10,
  DL_ROCM_HOST = 11, /* pinned */
  DL_CUDA_MANAGED = 13,
  DL_ONEAPI = 14,
};

enum dl_type_code {
  DL_INT = 0,
  DL_UINT = 1,
  DL_FLOAT = 2,
  DL_BFLOAT = 4,
  DL_COMPLEX = 5,
  DL_BOOL = 6,
  DL_FLOAT8_FIRST = 7, /* seven to fourteen are the kinds of float8 */
  DL_FLOAT8_LAST = 14,
};

enum dl_flags {
  DL_READ_ONLY = 1,
  DL_IS_COPIED = 2,
};

typedef struct dl_device {
  int32_t type;
  int32_t id;
} dl_device;

typedef struct dl_dtype {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
} dl_dtype;

typedef struct dl_tensor {
  void *data;
  dl_device device;
  int32_t ndim;
  dl_dtype dtype;
  int64_t *shape;   /* (ndim), may be NULL where ndim is 0 */
  int64_t *strides; /* (ndim) in elements; before 1.2 NULL meant C-contiguous */
  uint64_t byte_offset;
} dl_tensor;

/* What a capsule named "dltensor" holds. */
typedef struct dl_managed {
  dl_tensor tensor;
  void *context;
  void (*deleter)(struct dl_managed *self); /* may be NULL */
} dl_managed;

typedef struct dl_version {
  uint32_t major;
  uint32_t minor;
} dl_version;

/* What a capsule named "dltensor_versioned" holds.  With another major version only the deleter may
 * be touched. */
typedef struct dl_versioned {
  dl_version version;
  void *context;
  void (*deleter)(struct dl_versioned *self); /* may be NULL */
  uint64_t flags;
  dl_tensor tensor;
} dl_versioned;

/* The C exchange API: a table of functions that lives as long as the process, in a capsule named
 * "dlpack_exchange_api" on the tensor's type.  0 is success, -1 comes with an exception set. */
typedef struct dl_exchange_header {
  dl_version version;
  struct dl_exchange_header *previous; /* an older version of the table, or NULL */
} dl_exchange_header;

typedef struct dl_exchange {
  dl_exchange_header header;
  int (*allocate)(dl_tensor *prototype, dl_versioned **out, void *error_context,
                  void (*set_error)(void *error_context, const char *kind, const char *message));
  int (*managed_from_object)(void *object, dl_versioned **out);
  int (*managed_to_object)(dl_versioned *stolen, void **out_object);
  int (*tensor_from_object)(void *object, dl_tensor *out); /* borrowed from object; may be NULL */
  int (*current_stream)(int32_t device_type, int32_t device_id, void **out);
} dl_exchange;

#if UINTPTR_MAX == UINT64_MAX
static_assert(sizeof(dl_tensor) == 48, "dl_tensor is not laid out as DLPack says");
static_assert(sizeof(dl_managed) == 64, "dl_managed is not laid out as DLPack says");
static_assert(sizeof(dl_versioned) == 80, "dl_versioned is not laid out as DLPack says");
static_assert(offsetof(dl_versioned, tensor) == 32, "dl_versioned is not laid out as DLPack says");
static_assert(sizeof(dl_exchange) == 56, "dl_exchange is not laid out as DLPack says");
#endif

#endif
