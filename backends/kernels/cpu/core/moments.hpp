// Statistics for both layouts: merging blocks, the float64 fallback, 1 / standard deviation.

#pragma once

#include <algorithm>
#include <cmath>

#include "vectors.hpp"

namespace groupnorm {
namespace GROUPNORM_ISA {

struct Statistics {
  double count, mean, m2;  // m2: the sum of squared deviations from the mean

  double variance() const { return count > 0 ? m2 / count : 1.0; }
};

// A variance outside this range may come from squares that over- or underflowed in float32.
constexpr double MIN_VARIANCE = 1e-30, MAX_VARIANCE = 1e30;
// The square of the smallest normal float32. The factors of smaller deviations overflow float32.
constexpr double NO_VARIANCE = 0x1p-252;

// Whether moments were taken about a centre more than two standard deviations from the mean, given
// the sum, the mean and the sum of squares of the deviations from that centre. Then subtracting the
// centre's distance from `squares` cancels digits: they must be taken again about the mean.
template <class T>
INLINE bool centre_is_poor(T total, T mean, T squares) { return total * mean > T(0.8) * squares; }

// Merge a block of n elements, given its mean and M2, by the formula of Chan, Golub and LeVeque.
INLINE void merge(Statistics& into, double n, double mean, double m2) {
  const double delta = mean - into.mean, weight = n / (into.count + n);
  into.mean += delta * weight;
  into.m2 += m2 + delta * delta * (into.count * weight);
  into.count += n;
}

// The same, given the sums of its deviations from a centre and of their squares.
INLINE void merge_moments(Statistics& into, double n, double centre, double total, double squares) {
  const double shift = total / n, m2 = squares - total * shift;
  merge(into, n, centre + shift, m2 < 0 ? 0.0 : m2);  // this comparison keeps NaN
}

// The statistics in float64, of squares outside of float32's range. The elements are `rows` rows of
// `length` elements, `stride` apart; the mask has a value for each row, or for each element of one.
template <class X>
Statistics in_float64(
    const X* x, i64 rows, i64 stride, i64 length, const std::uint8_t* mask, bool mask_is_of_rows) {
  double count = 0, total = 0, squares = 0, base = 0, mean = 0;
  for (int round = 0; round < 2; ++round) {
    count = total = 0;
    for (i64 row = 0; row < rows; ++row) {
      for (i64 i = 0; i < length; ++i) {
        if (mask != nullptr && !mask[mask_is_of_rows ? row : i]) continue;
        const double value = scalar(x[row * stride + i]);
        if (round == 0 && count == 0) base = value;
        const double d = value - (round == 0 ? base : mean);
        count += 1;
        total += d;
        if (round == 1) squares += d * d;
      }
    }
    if (round == 0) mean = base + total / count;
  }
  const double m2 = squares - total * (total / count);
  return {count, mean, m2 < 0 ? 0.0 : m2};
}

inline i64 count_valid(const std::uint8_t* mask, i64 n) {
  i64 count = 0;
  for (i64 i = 0; i < n; ++i) count += mask[i] != 0;
  return count;
}

INLINE bool is_out_of_range(double variance) { return !(variance >= MIN_VARIANCE && variance <= MAX_VARIANCE); }

// 1 / sqrt(variance + epsilon), in float64, where squares of float32 values stay in range.
INLINE double inverse_deviation(double variance, double epsilon) {
  const double total = variance + epsilon;
  // Constant data without an epsilon: any value. This comparison keeps NaN.
  return total < NO_VARIANCE ? 1.0 : 1.0 / std::sqrt(total);
}

// Round a factor to finite float32: inf * 0 would make constant data NaN.
INLINE float finite_float32(double value) {
  value = value > 3e38 ? 3e38 : value;
  return static_cast<float>(value < -3e38 ? -3e38 : value);
}

INLINE double at(const float* parameter, i64 i, double neutral) { return parameter ? parameter[i] : neutral; }

// What normalizes the elements of one channel: activation((x - centre) * factor + term).
struct Affine {
  float centre, factor, term;
};

INLINE Affine affine(double mean, double rstd, double scale, double bias) {
  const float centre = static_cast<float>(mean);
  const double rest = mean - static_cast<double>(centre);
  return {centre, finite_float32(rstd * scale), static_cast<float>(bias - rest * rstd * scale)};
}

// What the gradient of x needs besides: g * factor - ((x - centre) * rstd * slope + offset), which
// is (p + xhat * q) * rstd with xhat = (x - centre - rest) * rstd.
struct Through {
  float rstd, slope, offset;
};

INLINE Through through(double mean, double rstd, double p, double q) {
  const double rest = mean - static_cast<double>(static_cast<float>(mean));
  return {finite_float32(rstd), finite_float32(rstd * q), finite_float32(rstd * (p - rest * rstd * q))};
}

// Keep the statistics of a group as the call wants them; return 1 / standard deviation.
INLINE double keep(const Call& call, i64 group, const Statistics& s) {
  const double rstd = inverse_deviation(s.variance(), call.epsilon);
  if (call.mean != nullptr) {
    const bool alone = !(call.stages & NORMALIZE);
    call.mean[group] = s.mean;
    call.rstd[group] = alone ? s.m2 : rstd;
    call.inv_count[group] = alone ? s.count : s.count > 0 ? 1 / s.count : 0.0;
  }
  return rstd;
}

}  // namespace GROUPNORM_ISA
}  // namespace groupnorm
