// The structs of XLA's foreign function interface that the handler reads and writes.
//
// They have the names and the layout of version 0.3 of the public header, xla/ffi/api/c_api.h in every
// jaxlib, each up to the last field that is used. The tests compare them with the installed header.
//
// Of versions, the header says: the major one changes with the layout of these structs; minor ones add
// fields at the ends of structs, or rename; and old ones stay supported for 12 months at least. So the
// handler declares the version it was written for, and leaves it to XLA to refuse that.
//
// Structs within another one would move its other fields if they grew: the handler checks that they
// have exactly the size they have here. All others may be longer.

#pragma once

#include <cstddef>
#include <cstdint>

// FIELD(struct, type, name, offset). Enumerations are ints; addresses of what is not read are void*.
#define GROUPNORM_XLA_STRUCTS(BEGIN, FIELD, END)                                   \
  BEGIN(XLA_FFI_Extension_Base)                                                    \
    FIELD(XLA_FFI_Extension_Base, std::size_t, struct_size, 0)                     \
    FIELD(XLA_FFI_Extension_Base, int, type, 8)                                    \
    FIELD(XLA_FFI_Extension_Base, XLA_FFI_Extension_Base*, next, 16)               \
  END                                                                              \
  BEGIN(XLA_FFI_Api_Version)                                                       \
    FIELD(XLA_FFI_Api_Version, std::size_t, struct_size, 0)                        \
    FIELD(XLA_FFI_Api_Version, void*, extension_start, 8)                          \
    FIELD(XLA_FFI_Api_Version, int, major_version, 16)                             \
    FIELD(XLA_FFI_Api_Version, int, minor_version, 20)                             \
  END                                                                              \
  BEGIN(XLA_FFI_Metadata)                                                          \
    FIELD(XLA_FFI_Metadata, std::size_t, struct_size, 0)                           \
    FIELD(XLA_FFI_Metadata, XLA_FFI_Api_Version, api_version, 8)                   \
  END                                                                              \
  BEGIN(XLA_FFI_Metadata_Extension)                                                \
    FIELD(XLA_FFI_Metadata_Extension, XLA_FFI_Extension_Base, extension_base, 0)   \
    FIELD(XLA_FFI_Metadata_Extension, XLA_FFI_Metadata*, metadata, 24)             \
  END                                                                              \
  BEGIN(XLA_FFI_Error_Create_Args)                                                 \
    FIELD(XLA_FFI_Error_Create_Args, std::size_t, struct_size, 0)                  \
    FIELD(XLA_FFI_Error_Create_Args, void*, extension_start, 8)                    \
    FIELD(XLA_FFI_Error_Create_Args, const char*, message, 16)                     \
    FIELD(XLA_FFI_Error_Create_Args, int, errc, 24)                                \
  END                                                                              \
  BEGIN(XLA_FFI_Api)                                                               \
    FIELD(XLA_FFI_Api, std::size_t, struct_size, 0)                                \
    FIELD(XLA_FFI_Api, void*, extension_start, 8)                                  \
    FIELD(XLA_FFI_Api, XLA_FFI_Api_Version, api_version, 16)                       \
    FIELD(XLA_FFI_Api, void*, internal_api, 40)                                    \
    FIELD(XLA_FFI_Api, XLA_FFI_Create_Error*, XLA_FFI_Error_Create, 48)            \
  END                                                                              \
  BEGIN(XLA_FFI_Buffer)                                                            \
    FIELD(XLA_FFI_Buffer, std::size_t, struct_size, 0)                             \
    FIELD(XLA_FFI_Buffer, void*, extension_start, 8)                               \
    FIELD(XLA_FFI_Buffer, int, dtype, 16)                                          \
    FIELD(XLA_FFI_Buffer, void*, data, 24)                                         \
    FIELD(XLA_FFI_Buffer, std::int64_t, rank, 32)                                  \
    FIELD(XLA_FFI_Buffer, std::int64_t*, dims, 40)                                 \
  END                                                                              \
  BEGIN(XLA_FFI_Array)                                                             \
    FIELD(XLA_FFI_Array, int, dtype, 0)                                            \
    FIELD(XLA_FFI_Array, std::size_t, size, 8)                                     \
    FIELD(XLA_FFI_Array, void*, data, 16)                                          \
  END                                                                              \
  BEGIN(XLA_FFI_Args)                                                              \
    FIELD(XLA_FFI_Args, std::size_t, struct_size, 0)                               \
    FIELD(XLA_FFI_Args, void*, extension_start, 8)                                 \
    FIELD(XLA_FFI_Args, std::int64_t, size, 16)                                    \
    FIELD(XLA_FFI_Args, int*, types, 24)                                           \
    FIELD(XLA_FFI_Args, XLA_FFI_Buffer**, args, 32)                                \
  END                                                                              \
  BEGIN(XLA_FFI_Rets)                                                              \
    FIELD(XLA_FFI_Rets, std::size_t, struct_size, 0)                               \
    FIELD(XLA_FFI_Rets, void*, extension_start, 8)                                 \
    FIELD(XLA_FFI_Rets, std::int64_t, size, 16)                                    \
    FIELD(XLA_FFI_Rets, int*, types, 24)                                           \
    FIELD(XLA_FFI_Rets, XLA_FFI_Buffer**, rets, 32)                                \
  END                                                                              \
  BEGIN(XLA_FFI_Attrs)                                                             \
    FIELD(XLA_FFI_Attrs, std::size_t, struct_size, 0)                              \
    FIELD(XLA_FFI_Attrs, void*, extension_start, 8)                                \
    FIELD(XLA_FFI_Attrs, std::int64_t, size, 16)                                   \
    FIELD(XLA_FFI_Attrs, int*, types, 24)                                          \
    FIELD(XLA_FFI_Attrs, void*, names, 32)                                         \
    FIELD(XLA_FFI_Attrs, void**, attrs, 40)                                        \
  END                                                                              \
  BEGIN(XLA_FFI_CallFrame)                                                         \
    FIELD(XLA_FFI_CallFrame, std::size_t, struct_size, 0)                          \
    FIELD(XLA_FFI_CallFrame, XLA_FFI_Extension_Base*, extension_start, 8)          \
    FIELD(XLA_FFI_CallFrame, const XLA_FFI_Api*, api, 16)                          \
    FIELD(XLA_FFI_CallFrame, void*, ctx, 24)                                       \
    FIELD(XLA_FFI_CallFrame, int, stage, 32)                                       \
    FIELD(XLA_FFI_CallFrame, XLA_FFI_Args, args, 40)                               \
    FIELD(XLA_FFI_CallFrame, XLA_FFI_Rets, rets, 80)                               \
    FIELD(XLA_FFI_CallFrame, XLA_FFI_Attrs, attrs, 120)                            \
  END

#define GROUPNORM_XLA_CONSTANTS(CONSTANT)            \
  CONSTANT(XLA_FFI_API_MAJOR, 0)                     \
  CONSTANT(XLA_FFI_API_MINOR, 3)                     \
  CONSTANT(XLA_FFI_Extension_Metadata, 1)            \
  CONSTANT(XLA_FFI_ArgType_BUFFER, 1)                \
  CONSTANT(XLA_FFI_RetType_BUFFER, 1)                \
  CONSTANT(XLA_FFI_AttrType_ARRAY, 1)                \
  CONSTANT(XLA_FFI_DataType_PRED, 1)                 \
  CONSTANT(XLA_FFI_DataType_S64, 5)                  \
  CONSTANT(XLA_FFI_DataType_U32, 8)                  \
  CONSTANT(XLA_FFI_DataType_F16, 10)                 \
  CONSTANT(XLA_FFI_DataType_F32, 11)                 \
  CONSTANT(XLA_FFI_DataType_BF16, 16)                \
  CONSTANT(XLA_FFI_Error_Code_INVALID_ARGUMENT, 3)   \
  CONSTANT(XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, 8) \
  CONSTANT(XLA_FFI_Error_Code_FAILED_PRECONDITION, 9)

namespace groupnorm {

struct XLA_FFI_Error;
struct XLA_FFI_Error_Create_Args;
using XLA_FFI_Create_Error = XLA_FFI_Error*(XLA_FFI_Error_Create_Args*);

#define GROUPNORM_BEGIN(name) struct name {
#define GROUPNORM_FIELD(of, type, name, offset) type name;
#define GROUPNORM_END };
GROUPNORM_XLA_STRUCTS(GROUPNORM_BEGIN, GROUPNORM_FIELD, GROUPNORM_END)
#undef GROUPNORM_BEGIN
#undef GROUPNORM_FIELD
#undef GROUPNORM_END

// On other machines there is no XLA, and no handler.
constexpr bool has_64_bits = sizeof(void*) == 8;

#define GROUPNORM_NOTHING(name)
#define GROUPNORM_FIELD(of, type, name, at) static_assert(!has_64_bits || offsetof(of, name) == at, #of "." #name);
GROUPNORM_XLA_STRUCTS(GROUPNORM_NOTHING, GROUPNORM_FIELD, )
#undef GROUPNORM_NOTHING
#undef GROUPNORM_FIELD

#define GROUPNORM_CONSTANT(name, value) constexpr int name = value;
GROUPNORM_XLA_CONSTANTS(GROUPNORM_CONSTANT)
#undef GROUPNORM_CONSTANT

// The size of a struct up to and with a field, as the header counts it.
#define GROUPNORM_XLA_END(of, field) (offsetof(of, field) + sizeof(of::field))

// The handler to register; null where there can be none.
void* xla_handler();

}  // namespace groupnorm
