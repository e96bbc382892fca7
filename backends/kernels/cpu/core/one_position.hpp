// One position: x is (samples, channels), and a group is a few neighbouring channels, each with
// factors of its own. Threads share the samples.

#pragma once

#include "channels_first.hpp"

namespace groupnorm {
namespace GROUPNORM_ISA {

// The factors of neighbouring channels, of which a group's mean and rstd are the same.
struct Row {
  F centre_, rstd_, shift_;
  const float *scale_, *bias_;

  Row(double mean, double rstd, const float* scale, const float* bias) : scale_(scale), bias_(bias) {
    const Affine a = affine(mean, rstd, 1, 0);
    centre_ = all(a.centre), rstd_ = all(a.factor), shift_ = all(a.term);
  }
  template <class L> INLINE F scale(i64 i, L lanes) const { return scale_ ? load(scale_ + i, lanes) : all(1); }
  template <class L> INLINE Factors at(i64 i, L lanes) const {
    const F s = scale(i, lanes), shift = shift_ * s;
    return {centre_, bounded(rstd_ * s, 3e38f), bias_ ? load(bias_ + i, lanes) + shift : shift};
  }
};

// In float64: for few elements, vectors would be mostly empty.
template <class X>
Statistics measure_few(const X* x, i64 n) {
  const double first = scalar(x[0]), count = static_cast<double>(n);
  double total = 0, m2 = 0;
  for (i64 i = 1; i < n; ++i) total += scalar(x[i]) - first;
  const double mean = first + total / count;
  for (i64 i = 0; i < n; ++i) m2 += (scalar(x[i]) - mean) * (scalar(x[i]) - mean);
  return {count, mean, m2};
}

constexpr i64 FEW = 16;

template <class X, class Y>
void one_position_forward(const Call& call, Scratch& scratch, int part) {
  const Shape& shape = call.shape;
  const i64 size = shape.size, channels = shape.channels();
  const auto one_sample = [&](i64 sample) {
    const bool valid = call.mask == nullptr || *call.mask_of(sample) != 0;
    const float *scale = call.scale_of(sample), *bias = call.bias_of(sample);
    for (i64 group = 0; group < shape.groups; ++group) {
      const i64 k = sample * shape.groups + group, c = group * size;
      const X* x = static_cast<const X*>(call.x) + sample * channels + c;
      double mean, rstd;
      if (call.stages & MEASURE) {
        const Statistics s = !valid ? Statistics{0, 0, 0} : size <= FEW ? measure_few(x, size) : measure(x, size);
        mean = s.mean, rstd = keep(call, k, s);
      } else {
        mean = call.mean[k], rstd = call.rstd[k];
      }
      if (!(call.stages & NORMALIZE)) continue;
      Y* y = static_cast<Y*>(call.y) + sample * channels + c;
      const Row row(mean, rstd, scale ? scale + c : nullptr, bias ? bias + c : nullptr);
      if (valid) {
        normalize(x, y, size, NO_PERIOD, row, call.activation, call.past_cache());
      } else {
        normalize_masked(x, y, size, row, Invalid{}, call.activation);
      }
    }
  };
  scratch.each_sample(call, part, [&](i64 sample, i64) { one_sample(sample); }, [] {});
}

// Store g = `activation_vjp` of dy and g * (x - centre); return the sums of scale times them.
template <class X, class Y>
Sums row_products(
    const X* x, const Y* dy, i64 n, const Row& row, bool valid, Activation activation, float* g, float* weighted) {
  F total = {}, products = {};
  with_activation(activation, [&](auto a) {
    each(n, [&](i64 i, auto lanes) {
      const Factors f = row.at(i, lanes);
      const Element e = valid ? element(x + i, lanes, f) : masked_element(x + i, lanes, f, I{});
      const F found = activation_vjp<a()>(e.z, load(dy + i, lanes)), scaled = found * row.scale(i, lanes);
      store(g + i, found, lanes);
      store(weighted + i, found * e.deviation, lanes);
      total += select(below(lanes), scaled, F{});
      products += select(below(lanes), scaled * e.deviation, F{});
    });
  });
  return {sum(total), sum(products)};
}

template <class X, class Y>
void one_position_backward(const Call& call, Scratch& scratch, int part) {
  const Shape& shape = call.shape;
  const i64 size = shape.size, channels = shape.channels();
  float *g = scratch.tables(part), *weighted = g + channels;
  const auto one_sample = [&](i64 sample, i64 span) {
    const bool valid = call.mask == nullptr || *call.mask_of(sample) != 0;
    const float *scale = call.scale_of(sample), *bias = call.bias_of(sample);
    for (i64 group = 0; group < shape.groups; ++group) {
      const i64 k = sample * shape.groups + group, c = group * size, start = sample * channels + c;
      const X* x = static_cast<const X*>(call.x) + start;
      const Y* dy = static_cast<const Y*>(call.dy) + start;
      const double mean = call.mean[k], rstd = call.rstd[k], share = call.inv_count[k];
      const double rest = mean - static_cast<double>(static_cast<float>(mean));
      const Row row(mean, rstd, scale ? scale + c : nullptr, bias ? bias + c : nullptr);
      double p = 0, q = 0;
      if (call.stages & SUM) {
        for (i64 begin = 0; begin < size; begin += BLOCK) {
          const i64 n = std::min(BLOCK, size - begin), at = c + begin;
          const Row here(mean, rstd, scale ? scale + at : nullptr, bias ? bias + at : nullptr);
          const Sums s = row_products(x + begin, dy + begin, n, here, valid, call.activation, g + at, weighted + at);
          p += s.first, q += s.second;
        }
        q = (q - rest * p) * rstd * share, p *= share;
        for (i64 i = c; i < c + size; ++i) {
          const double total = g[i];
          scratch.add_sums(call, sample, span, i, total, (weighted[i] - rest * total) * rstd);
        }
      } else {
        p = call.sum_dy[k], q = call.sum_dy_xhat[k];
      }
      if (!(call.stages & INPUT_GRADIENT)) continue;
      X* dx = static_cast<X*>(call.y) + start;
      const SameBacks t(through(mean, rstd, p, q));
      if (valid) {
        input_gradient(x, dy, dx, size, NO_PERIOD, row, t, call.activation, call.past_cache());
      } else {
        input_gradient_masked(x, dy, dx, size, row, t, Invalid{}, call.activation);
      }
    }
  };
  scratch.each_sample(call, part, one_sample, [&] { scratch.add_spans(call, channels); });
}

}  // namespace GROUPNORM_ISA
}  // namespace groupnorm
