/* Stands in for libcuda.so.1: launches nothing, records what it was asked to launch.
 *
 * A kernel's parameters are read from its cubin (.nv.info), as the real driver does, so a launch
 * with too few arguments, or with arguments of other sizes, is recorded with other values.
 */

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define PARAMETERS 64
#define RECORDS 4096
#define ATTRIBUTES 4
#define DEPTH 16

enum { INVALID_VALUE = 1, INVALID_CONTEXT = 201, NOT_FOUND = 500 };

typedef struct {
    uint64_t context;
    char name[64];
    int32_t parameters;
    int32_t sizes[PARAMETERS];
    int32_t dynamic_shared; /* as cuFuncSetAttribute sets it */
} Function;

typedef struct {
    uint64_t context;
    size_t bytes;
    unsigned char *image;
} Module;

/* The layout that tests read by ctypes. */
typedef struct {
    char name[64];
    uint32_t grid[3], block[3], shared;
    int32_t parameters;
    uint64_t stream, context, thread;
    int32_t sizes[PARAMETERS];
    uint64_t values[PARAMETERS];
    int32_t attributes, ids[ATTRIBUTES], attribute_values[ATTRIBUTES];
    int32_t dynamic_shared;
} Record;

typedef struct {
    uint32_t grid[3], block[3], shared;
    uint64_t stream;
    const unsigned char *attributes;
    uint32_t count;
} Config;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Record records[RECORDS];
static int recorded, recording = 1;
static char failing[64], called[1 << 16];
static int failure, modules_loaded, capability = 90;
static __thread uint64_t contexts[DEPTH];
static __thread int depth, capture_mode;

/* Returns the error that a test asked this function to return, if any. */
static int enter(const char *name) {
    if (!recording) return 0;
    pthread_mutex_lock(&lock);
    if (strlen(called) + strlen(name) + 2 < sizeof called) strcat(strcat(called, name), " ");
    int error = strcmp(failing, name) == 0 ? failure : 0;
    pthread_mutex_unlock(&lock);
    return error;
}

#define ENTER(name)                         \
    do {                                    \
        int error_ = enter(name);           \
        if (error_ != 0) return error_;     \
    } while (0)

/* For tests ------------------------------------------------------------------------------------ */

EXPORT void stand_in_reset(int with_records) {
    pthread_mutex_lock(&lock);
    recorded = failure = modules_loaded = 0;
    recording = with_records;
    failing[0] = called[0] = 0;
    pthread_mutex_unlock(&lock);
}

EXPORT void stand_in_fail(const char *name, int error) {
    pthread_mutex_lock(&lock);
    snprintf(failing, sizeof failing, "%s", name);
    failure = error;
    pthread_mutex_unlock(&lock);
}

EXPORT int stand_in_count(void) { return recorded; }
EXPORT const Record *stand_in_record(int i) { return i < recorded ? &records[i] : NULL; }
EXPORT const char *stand_in_called(void) { return called; }
EXPORT int stand_in_modules(void) { return modules_loaded; }
EXPORT size_t stand_in_record_bytes(void) { return sizeof(Record); }

/* The driver ----------------------------------------------------------------------------------- */

EXPORT int cuInit(unsigned flags) {
    ENTER("cuInit");
    return flags == 0 ? 0 : INVALID_VALUE;
}

EXPORT int cuGetErrorName(int error, const char **name) {
    *name = error == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE"
        : error == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT"
        : error == NOT_FOUND ? "CUDA_ERROR_NOT_FOUND" : NULL;
    return *name == NULL ? INVALID_VALUE : 0;
}

EXPORT int cuGetErrorString(int error, const char **text) {
    *text = error == INVALID_VALUE ? "invalid argument"
        : error == INVALID_CONTEXT ? "invalid device context"
        : error == NOT_FOUND ? "named symbol not found" : NULL;
    return *text == NULL ? INVALID_VALUE : 0;
}

EXPORT int cuDeviceGet(int *device, int ordinal) {
    ENTER("cuDeviceGet");
    *device = 100 + ordinal; /* unlike the ordinal, so that they cannot be confused */
    return 0;
}

EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER("cuDeviceGetAttribute");
    if (device < 100) return INVALID_VALUE;
    *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : 0;
    return 0;
}

EXPORT int cuDevicePrimaryCtxRetain(uint64_t *context, int device) {
    ENTER("cuDevicePrimaryCtxRetain");
    if (device < 100) return INVALID_VALUE;
    *context = 0x1000 + device - 100;
    return 0;
}

EXPORT int cuCtxGetCurrent(uint64_t *context) {
    ENTER("cuCtxGetCurrent");
    *context = depth == 0 ? 0 : contexts[depth - 1];
    return 0;
}

EXPORT int cuCtxSetCurrent(uint64_t context) {
    ENTER("cuCtxSetCurrent");
    if (depth == 0) depth = 1;
    contexts[depth - 1] = context;
    if (context == 0) depth--;
    return 0;
}

EXPORT int cuCtxPushCurrent_v2(uint64_t context) {
    ENTER("cuCtxPushCurrent");
    if (depth == DEPTH) return INVALID_VALUE;
    contexts[depth++] = context;
    return 0;
}

EXPORT int cuCtxPopCurrent_v2(uint64_t *context) {
    ENTER("cuCtxPopCurrent");
    if (depth == 0) return INVALID_CONTEXT;
    *context = contexts[--depth];
    return 0;
}

EXPORT int cuThreadExchangeStreamCaptureMode(int *mode) {
    ENTER("cuThreadExchangeStreamCaptureMode");
    int before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return 0;
}

static uint64_t word(const unsigned char *at, int bytes) {
    uint64_t value = 0;
    memcpy(&value, at, bytes);
    return value;
}

EXPORT int cuModuleLoadData(Module **module, const unsigned char *image) {
    ENTER("cuModuleLoadData");
    if (depth == 0 || contexts[depth - 1] == 0) return INVALID_CONTEXT;
    if (capture_mode != 2) return 900; /* as in a capture of the strictest mode */
    if (memcmp(image, "\177ELF", 4) != 0) return INVALID_VALUE;
    /* The section headers come last but for the program headers. */
    size_t sections = word(image + 40, 8) + word(image + 60, 2) * word(image + 58, 2);
    size_t programs = word(image + 32, 8) + word(image + 56, 2) * word(image + 54, 2);
    size_t bytes = sections > programs ? sections : programs;
    *module = malloc(sizeof **module);
    **module = (Module){contexts[depth - 1], bytes, malloc(bytes)};
    memcpy((*module)->image, image, bytes);
    pthread_mutex_lock(&lock);
    modules_loaded++;
    pthread_mutex_unlock(&lock);
    return 0;
}

/* Reads the sizes of parameters: records of format, attribute, length, value. */
static void read_parameters(Function *function, const unsigned char *at, size_t bytes) {
    const unsigned char *end = at + bytes;
    while (at + 4 <= end) {
        int format = at[0], attribute = at[1], length = 0;
        if (format == 4) length = (int)word(at + 2, 2);
        if (format == 4 && attribute == 0x17) { /* EIATTR_KPARAM_INFO */
            int ordinal = (int)word(at + 8, 2), size = (int)(word(at + 12, 4) >> 18);
            if (ordinal < PARAMETERS) function->sizes[ordinal] = size;
            if (ordinal >= function->parameters) function->parameters = ordinal + 1;
        }
        at += 4 + length;
    }
}

EXPORT int cuModuleGetFunction(Function **function, const Module *module, const char *name) {
    ENTER("cuModuleGetFunction");
    const unsigned char *image = module->image, *sections = image + word(image + 40, 8);
    int size = (int)word(image + 58, 2), count = (int)word(image + 60, 2);
    const unsigned char *strings = sections + (size_t)size * word(image + 62, 2);
    const char *names = (const char *)image + word(strings + 24, 8);
    char info[96], text[96];
    snprintf(info, sizeof info, ".nv.info.%s", name);
    snprintf(text, sizeof text, ".text.%s", name);
    Function *found = calloc(1, sizeof *found);
    int exists = 0;
    for (int i = 0; i < count; i++) {
        const unsigned char *section = sections + (size_t)size * i;
        const char *called_ = names + word(section, 4);
        if (strcmp(called_, text) == 0) exists = 1;
        if (strcmp(called_, info) == 0)
            read_parameters(found, image + word(section + 24, 8), word(section + 32, 8));
    }
    if (!exists) return NOT_FOUND;
    snprintf(found->name, sizeof found->name, "%s", name);
    found->context = module->context;
    *function = found;
    return 0;
}

EXPORT int cuFuncSetAttribute(Function *function, int attribute, int value) {
    ENTER("cuFuncSetAttribute");
    if (attribute != 8) return INVALID_VALUE;
    function->dynamic_shared = value;
    return 0;
}

EXPORT int cuLaunchKernelEx(const Config *config, const Function *function, void **arguments,
                            void **extra) {
    if (!recording) return 0;
    ENTER("cuLaunchKernelEx");
    uint64_t context = depth == 0 ? 0 : contexts[depth - 1];
    if (context != function->context) return INVALID_CONTEXT;
    if (extra != NULL || config->count > ATTRIBUTES) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    if (recorded < RECORDS) {
        Record *record = &records[recorded++];
        memset(record, 0, sizeof *record);
        memcpy(record->name, function->name, sizeof record->name);
        memcpy(record->grid, config->grid, sizeof record->grid);
        memcpy(record->block, config->block, sizeof record->block);
        record->shared = config->shared;
        record->stream = config->stream;
        record->context = context;
        record->thread = (uint64_t)pthread_self();
        record->parameters = function->parameters;
        record->dynamic_shared = function->dynamic_shared;
        for (int i = 0; i < function->parameters; i++) {
            record->sizes[i] = function->sizes[i];
            record->values[i] = word(arguments[i], function->sizes[i]);
        }
        record->attributes = (int32_t)config->count;
        for (uint32_t i = 0; i < config->count; i++) { /* an id, 4 bytes of padding, 64 of value */
            record->ids[i] = (int32_t)word(config->attributes + 72 * i, 4);
            record->attribute_values[i] = (int32_t)word(config->attributes + 72 * i + 8, 4);
        }
    }
    pthread_mutex_unlock(&lock);
    return 0;
}
