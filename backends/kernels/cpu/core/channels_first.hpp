// Channels first: a group of a sample is one contiguous stretch of memory.
//
// It is normalized right after it was measured, while it is in the cache. The groups of all samples
// are the tasks that threads share.
//
// A stretch is read once for its statistics, in blocks. The first block is measured about the mean of
// some of its elements, another about the mean of the previous one, and, only if that turns out to be
// far from its own mean (`centre_is_poor`), again about its own. Blocks are merged in float64. So no
// data can mislead a centre, and the order of operations depends on the shape alone.

#pragma once

#include "loops.hpp"
#include "scratch.hpp"
#include "sharing.hpp"

namespace groupnorm {
namespace GROUPNORM_ISA {

constexpr i64 BLOCK = 2048;  // elements that are summed in float32
// Elements whose mean is the centre of the first block. With fewer, short groups are faster and up to
// 2.5 times less accurate.
constexpr i64 SAMPLE = 64;

// Sums over elements -------------------------------------------------------------------------------

// Four vectors at a time, in sums of their own: additions take longer than they take to begin.
template <class Body>
INLINE void each_by_four(i64 n, Body body) {
  i64 i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    body(i, All{}, 0);
    body(i + LANES, All{}, 1);
    body(i + 2 * LANES, All{}, 2);
    body(i + 3 * LANES, All{}, 3);
  }
  for (; i + LANES <= n; i += LANES) body(i, All{}, 0);
  if (i < n) body(i, First{static_cast<int>(n - i)}, 1);
}

INLINE I below(All) { return ~I{}; }
INLINE I below(First lanes) {
  I index;
  for (int i = 0; i < LANES; ++i) index[i] = i;
  return index < lanes.n;
}

INLINE float sum(const F* parts) { return sum((parts[0] + parts[1]) + (parts[2] + parts[3])); }

struct Sums {
  float first, second;
};

// Sum of x - base.
template <class X>
float deviations(const X* x, i64 n, float base) {
  F total[4] = {};
  each_by_four(n, [&](i64 i, auto lanes, int k) { total[k] += select(below(lanes), load(x + i, lanes) - base, F{}); });
  return sum(total);
}

// Sums of x - centre and of its square, of the valid elements.
template <class X, class Valid>
INLINE Sums moments(const X* x, i64 n, float centre, Valid valid) {
  F total[4] = {}, squares[4] = {};
  each_by_four(n, [&](i64 i, auto lanes, int k) {
    const F d = select(valid(i, lanes), load(x + i, lanes) - centre, F{});
    total[k] += d;
    squares[k] += d * d;
  });
  return {sum(total), sum(squares)};
}

template <class X>
Sums moments(const X* x, i64 n, float centre) {
  return moments(x, n, centre, [](i64, auto lanes) { return below(lanes); });
}

template <class X>
Sums moments(const X* x, i64 n, float centre, const std::uint8_t* mask) {
  return moments(x, n, centre, [=](i64 i, auto lanes) { return is_valid(mask + i, lanes); });
}

// Sums of g = `activation_vjp` of dy, and of g * (x - centre).
template <class X, class Y>
Sums products(
    const X* x, const Y* dy, i64 n, const Same& p, const std::uint8_t* mask, Activation activation) {
  F total[4] = {}, weighted[4] = {};
  with_activation(activation, [&](auto a) {
    const auto add = [&](i64 i, auto lanes, int k, const Element& e) {
      const F g = select(below(lanes), activation_vjp<a()>(e.z, load(dy + i, lanes)), F{});
      total[k] += g;
      weighted[k] += g * e.deviation;
    };
    if (mask == nullptr) {
      each_by_four(n, [&](i64 i, auto lanes, int k) { add(i, lanes, k, element(x + i, lanes, p.factors)); });
    } else {
      each_by_four(n, [&](i64 i, auto lanes, int k) {
        add(i, lanes, k, masked_element(x + i, lanes, p.factors, is_valid(mask + i, lanes)));
      });
    }
  });
  return {sum(total), sum(weighted)};
}

// Statistics ---------------------------------------------------------------------------------------

template <class X>
Statistics measure(const X* x, i64 n) {
  Statistics found = {0, 0, 0};
  const i64 sampled = std::min(SAMPLE, n);
  const float first = scalar(x[0]);
  float centre = first + deviations(x, sampled, first) / static_cast<float>(sampled);
  for (i64 at = 0; at < n; at += BLOCK) {
    const i64 length = std::min(BLOCK, n - at);
    const float count = static_cast<float>(length);
    Sums s = moments(x + at, length, centre);
    if (centre_is_poor(s.first, s.first / count, s.second)) {
      // Relative to the centre, so that the mean of equal values is exactly that value.
      centre += deviations(x + at, length, centre) / count;
      s = moments(x + at, length, centre);
    }
    merge_moments(found, count, centre, s.first, s.second);
    centre += s.first / count;
  }
  return is_out_of_range(found.variance()) ? in_float64(x, 1, 0, n, nullptr, false) : found;
}

// The same, of `size` channels, at the positions whose mask is not 0.
template <class X>
Statistics measure(const X* x, i64 size, i64 positions, const std::uint8_t* mask) {
  Statistics found = {0, 0, 0};
  float centre = 0;
  for (i64 channel = 0; channel < size; ++channel) {
    for (i64 begin = 0; begin < positions; begin += BLOCK) {
      const i64 length = std::min(BLOCK, positions - begin);
      const X* at = x + channel * positions + begin;
      const std::uint8_t* valid = mask + begin;
      const float count = static_cast<float>(count_valid(valid, length));
      if (count == 0) continue;
      Sums s = moments(at, length, centre, valid);
      if (found.count == 0 || centre_is_poor(s.first, s.first / count, s.second) || s.first - s.first != 0) {
        // Again about a valid element, then about the mean.
        centre = scalar(at[std::find_if(valid, valid + length, [](auto v) { return v != 0; }) - valid]);
        centre += moments(at, length, centre, valid).first / count;
        s = moments(at, length, centre, valid);
      }
      merge_moments(found, count, centre, s.first, s.second);
      centre += s.first / count;
    }
  }
  if (found.count == 0 || !is_out_of_range(found.variance())) return found;
  return in_float64(x, size, positions, positions, mask, false);
}

// Kernels ------------------------------------------------------------------------------------------

template <class X, class Y>
void normalize_group(
    const Call& call, const X* x, Y* y, i64 sample, i64 group, double mean, double rstd) {
  const i64 positions = call.shape.positions;
  const float *scale = call.scale_of(sample), *bias = call.bias_of(sample);
  for (i64 channel = 0; channel < call.shape.size; ++channel) {
    const i64 c = group * call.shape.size + channel, row = channel * positions;
    const Same p(affine(mean, rstd, at(scale, c, 1), at(bias, c, 0)));
    if (call.mask == nullptr) {
      normalize(x + row, y + row, positions, NO_PERIOD, p, call.activation, call.past_cache());
    } else {
      normalize_masked(x + row, y + row, positions, p, Bytes{call.mask_of(sample)}, call.activation);
    }
  }
}

template <class X, class Y>
void channels_first_forward(const Call& call, Scratch& scratch, int part) {
  const Shape& shape = call.shape;
  const X* all_x = static_cast<const X*>(call.x);
  Y* all_y = static_cast<Y*>(call.y);
  const i64 stretch = shape.stretch();
  scratch.round(0).run(scratch.tasks, part, [&](i64 task) {
    const i64 end = std::min((task + 1) * scratch.grain, shape.samples * shape.groups);
    for (i64 i = task * scratch.grain; i < end; ++i) {
      const i64 sample = i / shape.groups, group = i % shape.groups;
      const X* x = all_x + i * stretch;
      if (call.stages & MEASURE) {
        const Statistics s = call.mask == nullptr
            ? measure(x, stretch)
            : measure(x, shape.size, shape.positions, call.mask_of(sample));
        const double rstd = keep(call, i, s);
        if (call.stages & NORMALIZE) normalize_group(call, x, all_y + i * stretch, sample, group, s.mean, rstd);
      } else {
        normalize_group(call, x, all_y + i * stretch, sample, group, call.mean[i], call.rstd[i]);
      }
    }
  }, [] {});
}

// Sum g and g * xhat over a channel's positions; blocks are added in float64.
template <class X, class Y>
void sum_channel(
    const Call& call, const X* x, const Y* dy, const Same& p, const std::uint8_t* mask, double mean,
    double rstd, double* total, double* weighted) {
  *total = *weighted = 0;
  for (i64 begin = 0; begin < call.shape.positions; begin += BLOCK) {
    const i64 n = std::min(BLOCK, call.shape.positions - begin);
    const Sums s = products(x + begin, dy + begin, n, p, mask ? mask + begin : nullptr, call.activation);
    *total += s.first;
    *weighted += s.second;
  }
  const double rest = mean - static_cast<double>(static_cast<float>(mean));
  *weighted = (*weighted - rest * *total) * rstd;
}

// A task is a group of all samples of a span.
template <class X, class Y>
void channels_first_backward(const Call& call, Scratch& scratch, int part) {
  const Shape& shape = call.shape;
  const i64 size = shape.size, positions = shape.positions, channels = shape.channels();
  const auto task = [&](i64 span, i64 group) {
    for (i64 sample = scratch.first_sample(span); sample < scratch.end_sample(span); ++sample) {
      const i64 row = sample * shape.groups + group, start = row * shape.stretch();
      const X* x = static_cast<const X*>(call.x) + start;
      const Y* dy = static_cast<const Y*>(call.dy) + start;
      const double mean = call.mean[row], rstd = call.rstd[row], share = call.inv_count[row];
      const float *scale = call.scale_of(sample), *bias = call.bias_of(sample);
      const std::uint8_t* mask = call.mask_of(sample);
      double p = 0, q = 0;
      if (call.stages & SUM) {
        for (i64 channel = 0; channel < size; ++channel) {
          const i64 c = group * size + channel, at_row = channel * positions;
          double total, weighted;
          const Same affines(affine(mean, rstd, at(scale, c, 1), at(bias, c, 0)));
          sum_channel(call, x + at_row, dy + at_row, affines, mask, mean, rstd, &total, &weighted);
          scratch.add_sums(call, sample, span, c, total, weighted);
          p += at(scale, c, 1) * total * share;
          q += at(scale, c, 1) * weighted * share;
        }
      } else {
        p = call.sum_dy[row], q = call.sum_dy_xhat[row];
      }
      if (!(call.stages & INPUT_GRADIENT)) continue;
      X* dx = static_cast<X*>(call.y) + start;
      const SameBacks t(through(mean, rstd, p, q));
      for (i64 channel = 0; channel < size; ++channel) {
        const i64 c = group * size + channel, at_row = channel * positions;
        const Same affines(affine(mean, rstd, at(scale, c, 1), at(bias, c, 0)));
        if (mask == nullptr) {
          input_gradient(
              x + at_row, dy + at_row, dx + at_row, positions, NO_PERIOD, affines, t, call.activation,
              call.past_cache());
        } else {
          input_gradient_masked(
              x + at_row, dy + at_row, dx + at_row, positions, affines, t, Bytes{mask}, call.activation);
        }
      }
    }
  };
  const i64 pairs = scratch.spans * shape.groups;
  scratch.round(0).run(scratch.tasks, part, [&](i64 claim) {
    for (i64 i = claim * scratch.grain; i < std::min((claim + 1) * scratch.grain, pairs); ++i) {
      task(i / shape.groups, i % shape.groups);
    }
  }, [&] { scratch.add_spans(call, channels); });
}

}  // namespace GROUPNORM_ISA
}  // namespace groupnorm
