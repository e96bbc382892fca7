// What one call of a kernel reads and writes.

#pragma once

#include <cstdint>

namespace groupnorm {

using i64 = std::int64_t;

enum class Dtype : int { float32, float16, bfloat16 };
constexpr int DTYPES = 3;
inline i64 item_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

enum class Activation : int { none, relu, silu, gelu };

// The stages of a call. Both of a direction are fused, sample by sample in cache; one alone is for
// callers that combine statistics of several arrays, or sums of several processes, in between.
enum Stages : int {
  MEASURE = 1,    // forward: the statistics of each group
  NORMALIZE = 2,  // forward: the result, with given statistics
  FORWARD = MEASURE | NORMALIZE,
  SUM = 4,              // backward: the sums over positions of each channel
  INPUT_GRADIENT = 8,   // backward: dx, with given means over each group
  BACKWARD = SUM | INPUT_GRADIENT,
};

constexpr i64 PAST_CACHE = 3 << 22;

struct Shape {
  i64 samples, groups, size, positions;  // size: channels of a group
  bool channels_first;                   // whether channels come before positions

  i64 channels() const { return groups * size; }
  i64 stretch() const { return size * positions; }  // elements of a group
  i64 elements() const { return samples * channels() * positions; }
};

// Arrays are dense, of shape (samples, channels, positions) or (samples, positions, channels).
struct Call {
  Shape shape;
  Stages stages;
  Dtype x_dtype, y_dtype;  // y_dtype: of the result; backward: of dy
  Activation activation;
  double epsilon;
  int threads;  // at most so many

  const void* x;
  void* y;          // the result; backward: dx, in the dtype of x
  const void* dy;   // backward
  // One row for each sample, `parameter_stride` apart, or one row for all: then it is 0. Null: 1, 0.
  const float *scale, *bias;
  i64 parameter_stride;
  // Bytes, (positions) of each sample, `mask_stride` apart, or of all samples: then it is 0.
  const std::uint8_t* mask;
  i64 mask_stride;

  // The statistics, (samples, groups) each. MEASURE alone writes mean, M2 (the sum of squared
  // deviations) and the count; otherwise they are mean, 1 / standard deviation and 1 / count, which
  // a FORWARD need not keep: then they are null.
  double *mean, *rstd, *inv_count;

  // Backward: (batches, channels) each; the samples of each batch are added up.
  float *dscale, *dbias;
  i64 batches;
  // SUM alone writes the sums of dy and dy * xhat, (samples, channels) each; INPUT_GRADIENT alone
  // reads the means of scale * dy and scale * dy * xhat over each group, (samples, groups) each.
  double *sum_dy, *sum_dy_xhat;

  bool forward() const { return stages & FORWARD; }
  // Whether the result is too large for caches to keep it until it is read.
  bool past_cache() const { return shape.elements() * item_bytes(y_dtype) >= PAST_CACHE; }
  const std::uint8_t* mask_of(i64 sample) const { return mask ? mask + sample * mask_stride : nullptr; }
  const float* scale_of(i64 sample) const { return scale ? scale + sample * parameter_stride : nullptr; }
  const float* bias_of(i64 sample) const { return bias ? bias + sample * parameter_stride : nullptr; }
};

}  // namespace groupnorm
