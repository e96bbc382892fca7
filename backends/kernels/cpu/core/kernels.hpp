// The kernels of one instruction set, for each pair of dtypes.

#include "channels_first.hpp"
#include "channels_last.hpp"
#include "one_position.hpp"
#include "kernel_table.hpp"

namespace groupnorm {
namespace GROUPNORM_ISA {

template <class X, class Y>
void forward(const Call& call, Scratch& scratch, int part) {
  if (call.shape.positions == 1) {
    one_position_forward<X, Y>(call, scratch, part);
  } else if (call.shape.channels_first) {
    channels_first_forward<X, Y>(call, scratch, part);
  } else {
    channels_last_forward<X, Y>(call, scratch, part);
  }
  end_of_stream();
}

template <class X, class Y>
void backward(const Call& call, Scratch& scratch, int part) {
  if (call.shape.positions == 1) {
    one_position_backward<X, Y>(call, scratch, part);
  } else if (call.shape.channels_first) {
    channels_first_backward<X, Y>(call, scratch, part);
  } else {
    channels_last_backward<X, Y>(call, scratch, part);
  }
  end_of_stream();
}

}  // namespace GROUPNORM_ISA

// Gradients of the result have the dtype of x or are float32.
const Kernels GROUPNORM_KERNELS = {
    {{GROUPNORM_ISA::forward<float, float>, GROUPNORM_ISA::forward<float, GROUPNORM_ISA::float16>,
      GROUPNORM_ISA::forward<float, GROUPNORM_ISA::bfloat16>},
     {GROUPNORM_ISA::forward<GROUPNORM_ISA::float16, float>,
      GROUPNORM_ISA::forward<GROUPNORM_ISA::float16, GROUPNORM_ISA::float16>,
      GROUPNORM_ISA::forward<GROUPNORM_ISA::float16, GROUPNORM_ISA::bfloat16>},
     {GROUPNORM_ISA::forward<GROUPNORM_ISA::bfloat16, float>,
      GROUPNORM_ISA::forward<GROUPNORM_ISA::bfloat16, GROUPNORM_ISA::float16>,
      GROUPNORM_ISA::forward<GROUPNORM_ISA::bfloat16, GROUPNORM_ISA::bfloat16>}},
    {{GROUPNORM_ISA::backward<float, float>, nullptr, nullptr},
     {GROUPNORM_ISA::backward<GROUPNORM_ISA::float16, float>,
      GROUPNORM_ISA::backward<GROUPNORM_ISA::float16, GROUPNORM_ISA::float16>, nullptr},
     {GROUPNORM_ISA::backward<GROUPNORM_ISA::bfloat16, float>, nullptr,
      GROUPNORM_ISA::backward<GROUPNORM_ISA::bfloat16, GROUPNORM_ISA::bfloat16>}},
};

}  // namespace groupnorm
