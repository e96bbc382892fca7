// The handler of XLA's foreign function interface, through which programs for CPUs call the kernels.
//
// XLA calls it with a frame: buffers, and one attribute of plain numbers, so that programs stored on
// disk run in other processes. All else is read from the buffers' dtypes and sizes. These must fit the
// numbers: a program is a file that anybody may have written.

#include <cstring>
#include <initializer_list>
#include <limits>

#include "run.hpp"
#include "xla_ffi.hpp"

namespace groupnorm {
namespace {

// The numbers of the attribute. If their meaning changes, so must the name the handler is registered
// by: stored programs may be older.
enum : int { STAGES, SAMPLES, GROUPS, SIZE, POSITIONS, CHANNELS_FIRST, ACTIVATION, EPSILON, THREADS, NUMBERS };

struct Refused {
  int code;
  const char* message;
};

void require(bool known) {
  if (!known) {
    throw Refused{XLA_FFI_Error_Code_FAILED_PRECONDITION,
                  "groupnorm: XLA's call frame does not have the version that the handler was written for"};
  }
}

void require_numbers(bool valid) {
  if (!valid) throw Refused{XLA_FFI_Error_Code_INVALID_ARGUMENT, "groupnorm: a number of the call is out of range"};
}

void require_buffers(bool valid) {
  if (!valid) throw Refused{XLA_FFI_Error_Code_INVALID_ARGUMENT, "groupnorm: a buffer does not fit the numbers of the call"};
}

// The product of two sizes, and its 64-bit floats, can be counted in bytes.
bool is_countable(i64 a, i64 b) { return a >= 0 && b >= 0 && (b == 0 || a <= (i64{1} << 59) / b); }

struct Buffer {
  int dtype;
  void* data;
  i64 elements;

  template <class T>
  T* as() const { return static_cast<T*>(data); }

  Dtype of_values() const {
    require_buffers(dtype == XLA_FFI_DataType_F32 || dtype == XLA_FFI_DataType_F16 || dtype == XLA_FFI_DataType_BF16);
    if (dtype == XLA_FFI_DataType_F32) return Dtype::float32;
    return dtype == XLA_FFI_DataType_F16 ? Dtype::float16 : Dtype::bfloat16;
  }
};

// The arguments or results of a call, one after the other.
struct Buffers {
  i64 left;
  const int* types;
  XLA_FFI_Buffer* const* next_one;

  Buffer next() {
    require_buffers(left > 0 && *types == XLA_FFI_ArgType_BUFFER);
    const XLA_FFI_Buffer& given = **next_one;
    require(given.struct_size >= GROUPNORM_XLA_END(XLA_FFI_Buffer, dims));
    Buffer found{given.dtype, given.data, 1};
    for (i64 i = 0; i < given.rank; ++i) {
      require_buffers(is_countable(found.elements, given.dims[i]));
      found.elements *= given.dims[i];
    }
    --left, ++types, ++next_one;
    return found;
  }

  Buffer next(int dtype, i64 elements) {
    const Buffer found = next();
    require_buffers(found.dtype == dtype && found.elements == elements);
    return found;
  }

  // A buffer with one row, or with one for each of `rows`: the distance of rows is `stride` then, else 0.
  Buffer next_rows(int dtype, i64 row, i64 rows, i64& stride) {
    const Buffer found = next();
    require_buffers(found.dtype == dtype && (found.elements == row || found.elements == row * rows));
    stride = found.elements == row ? 0 : row;
    return found;
  }

  Buffer next_values(i64 elements, Dtype& dtype) {
    const Buffer found = next();
    require_buffers(found.elements == elements);
    dtype = found.of_values();
    return found;
  }
};
static_assert(XLA_FFI_ArgType_BUFFER == XLA_FFI_RetType_BUFFER, "both are read by the same class");

void read_numbers(const XLA_FFI_Attrs& attributes, Call& call) {
  require_numbers(attributes.size == 1 && attributes.types[0] == XLA_FFI_AttrType_ARRAY);
  const auto& array = *static_cast<const XLA_FFI_Array*>(attributes.attrs[0]);
  require_numbers(array.dtype == XLA_FFI_DataType_S64 && array.size == NUMBERS);
  i64 numbers[NUMBERS];
  std::memcpy(numbers, array.data, sizeof numbers);
  i64 elements = 1;
  for (const int size : {SAMPLES, GROUPS, SIZE, POSITIONS}) {
    require_numbers(numbers[size] > 0 && is_countable(elements, numbers[size]));
    elements *= numbers[size];
  }
  require_numbers(numbers[STAGES] == FORWARD || numbers[STAGES] == BACKWARD);
  require_numbers(numbers[CHANNELS_FIRST] == 0 || numbers[CHANNELS_FIRST] == 1);
  require_numbers(0 <= numbers[ACTIVATION] && numbers[ACTIVATION] <= static_cast<i64>(Activation::gelu));
  require_numbers(0 < numbers[THREADS] && numbers[THREADS] <= std::numeric_limits<int>::max());
  call.shape = {numbers[SAMPLES], numbers[GROUPS], numbers[SIZE], numbers[POSITIONS], numbers[CHANNELS_FIRST] == 1};
  call.stages = static_cast<Stages>(numbers[STAGES]);
  call.activation = static_cast<Activation>(numbers[ACTIVATION]);
  std::memcpy(&call.epsilon, &numbers[EPSILON], sizeof call.epsilon);
  call.threads = static_cast<int>(numbers[THREADS]);
}

// Forward: x, scale, bias, mask -> y, saved. Backward: dy, x, scale, bias, mask, saved -> dx, dscale,
// dbias. There may be no mask.
void read_buffers(Buffers given, Buffers results, Call& call) {
  const Shape& shape = call.shape;
  const i64 elements = shape.elements(), channels = shape.channels();
  const bool backward = !call.forward(), masked = given.left == (backward ? 6 : 4);
  if (backward) call.dy = given.next_values(elements, call.y_dtype).data;
  call.x = given.next_values(elements, call.x_dtype).data;
  i64 stride;
  call.scale = given.next_rows(XLA_FFI_DataType_F32, channels, shape.samples, call.parameter_stride).as<float>();
  call.bias = given.next_rows(XLA_FFI_DataType_F32, channels, shape.samples, stride).as<float>();
  require_buffers(stride == call.parameter_stride);
  if (masked) {
    call.mask = given.next_rows(XLA_FFI_DataType_PRED, shape.positions, shape.samples, call.mask_stride).as<std::uint8_t>();
  }
  Buffers& of_saved = backward ? given : results;
  Dtype result;
  call.y = results.next_values(elements, result).data;
  // 64-bit floats, which JAX may be set up not to have, in two integers each.
  const i64 saved = shape.samples * shape.groups;
  call.mean = of_saved.next(XLA_FFI_DataType_U32, 3 * saved * 2).as<double>();
  call.rstd = call.mean + saved, call.inv_count = call.rstd + saved;
  if (backward) {
    require_buffers(result == call.x_dtype && (call.y_dtype == call.x_dtype || call.y_dtype == Dtype::float32));
    const Buffer dscale = results.next();
    require_buffers(dscale.dtype == XLA_FFI_DataType_F32 && dscale.elements > 0 && dscale.elements % channels == 0);
    call.batches = dscale.elements / channels;
    require_buffers(shape.samples % call.batches == 0);
    call.dscale = dscale.as<float>();
    call.dbias = results.next(XLA_FFI_DataType_F32, dscale.elements).as<float>();
  } else {
    call.y_dtype = result;
  }
  require_buffers(given.left == 0 && results.left == 0);
}

// Return whether XLA only asks for the version, and answer that.
bool declares_version(const XLA_FFI_CallFrame& frame) {
  for (auto* found = frame.extension_start; found != nullptr; found = found->next) {
    if (found->type != XLA_FFI_Extension_Metadata) continue;
    XLA_FFI_Metadata& metadata = *reinterpret_cast<XLA_FFI_Metadata_Extension*>(found)->metadata;
    if (metadata.struct_size >= GROUPNORM_XLA_END(XLA_FFI_Metadata, api_version)) {
      metadata.api_version.major_version = XLA_FFI_API_MAJOR;
      metadata.api_version.minor_version = XLA_FFI_API_MINOR;
    }
    return true;
  }
  return false;
}

void handle(const XLA_FFI_CallFrame& frame) {
  require(frame.struct_size >= GROUPNORM_XLA_END(XLA_FFI_CallFrame, attrs) &&
          frame.args.struct_size == GROUPNORM_XLA_END(XLA_FFI_Args, args) &&
          frame.rets.struct_size == GROUPNORM_XLA_END(XLA_FFI_Rets, rets) &&
          frame.attrs.struct_size >= GROUPNORM_XLA_END(XLA_FFI_Attrs, attrs) &&
          frame.api->struct_size >= GROUPNORM_XLA_END(XLA_FFI_Api, XLA_FFI_Error_Create) &&
          frame.api->api_version.struct_size == GROUPNORM_XLA_END(XLA_FFI_Api_Version, minor_version));
  Call call{};
  call.batches = 1;
  read_numbers(frame.attrs, call);
  const Buffers given{frame.args.size, frame.args.types, frame.args.args};
  const Buffers results{frame.rets.size, frame.rets.types, frame.rets.rets};
  read_buffers(given, results, call);
  run(call, false);
}

XLA_FFI_Error* answer(XLA_FFI_CallFrame* frame) noexcept {
  if (declares_version(*frame)) return nullptr;
  Refused refused;
  try {
    handle(*frame);
    return nullptr;
  } catch (const Refused& why) {
    refused = why;
  } catch (...) {
    refused = {XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "groupnorm: there is not enough memory to call a kernel"};
  }
  XLA_FFI_Error_Create_Args error{
      GROUPNORM_XLA_END(XLA_FFI_Error_Create_Args, errc), nullptr, refused.message, refused.code};
  return frame->api->XLA_FFI_Error_Create(&error);
}

}  // namespace

void* xla_handler() { return has_64_bits ? reinterpret_cast<void*>(answer) : nullptr; }

}  // namespace groupnorm
