// Loops over contiguous elements that normalize them, or compute their gradients.
//
// The factors are the `Same` for all elements (channels first), or in a `Table` (channels last). A
// mask is `Bytes`, one for each element, or `Invalid`: all elements are masked out. Masked-out
// elements do not contribute to the statistics, but are normalized: non-finite ones count as 0, and
// the others are bounded so that no product overflows: an inf would make gradients NaN, though its
// cotangent is 0.

#pragma once

#include <type_traits>

#include "activations.hpp"
#include "moments.hpp"

namespace groupnorm {
namespace GROUPNORM_ISA {

struct Same {
  F centre_, factor_, term_;

  explicit Same(Affine a) : centre_(all(a.centre)), factor_(all(a.factor)), term_(all(a.term)) {}
  template <class L> INLINE F centre(i64, L) const { return centre_; }
  template <class L> INLINE F factor(i64, L) const { return factor_; }
  template <class L> INLINE F term(i64, L) const { return term_; }
};

struct SameThrough {
  F rstd_, slope_, offset_;

  explicit SameThrough(Through t) : rstd_(all(t.rstd)), slope_(all(t.slope)), offset_(all(t.offset)) {}
  template <class L> INLINE F rstd(i64, L) const { return rstd_; }
  template <class L> INLINE F slope(i64, L) const { return slope_; }
  template <class L> INLINE F offset(i64, L) const { return offset_; }
};

struct Table {
  float *centres, *factors, *terms;

  template <class L> INLINE F centre(i64 i, L lanes) const { return load(centres + i, lanes); }
  template <class L> INLINE F factor(i64 i, L lanes) const { return load(factors + i, lanes); }
  template <class L> INLINE F term(i64 i, L lanes) const { return load(terms + i, lanes); }
};

struct ThroughTable {
  float *rstds, *slopes, *offsets;

  template <class L> INLINE F rstd(i64 i, L lanes) const { return load(rstds + i, lanes); }
  template <class L> INLINE F slope(i64 i, L lanes) const { return load(slopes + i, lanes); }
  template <class L> INLINE F offset(i64 i, L lanes) const { return load(offsets + i, lanes); }
};

struct Bytes {
  const std::uint8_t* bytes;
  template <class L> INLINE I valid(i64 i, L lanes) const { return is_valid(bytes + i, lanes); }
};

struct Invalid {
  template <class L> INLINE I valid(i64, L) const { return I{}; }
};

// The deviation of x from the centre, bounded where x is masked out.
template <class X, class L, class P, class M>
INLINE F masked_deviation(const X* x, i64 i, L lanes, const P& p, I valid, F* value) {
  *value = load(x + i, lanes);
  const F centre = p.centre(i, lanes);
  const F limit = min(all(5e33f), 1e38f / max(abs(p.factor(i, lanes)), all(1)));
  const F d = select(is_finite(*value), *value, F{}) - centre;
  return select(valid, *value - centre, min(max(d, -limit), limit));
}

// Store y = activation((x - centre) * factor + term). If `past_cache`, y is not written to the cache.
template <class X, class Y, class P>
INLINE void normalize(const X* x, Y* y, i64 n, const P& p, Activation activation, bool past_cache) {
  with_activation(activation, [&](auto a) {
    const auto value = [&](i64 i, auto lanes) {
      return activated<a()>((load(x + i, lanes) - p.centre(i, lanes)) * p.factor(i, lanes) + p.term(i, lanes));
    };
    i64 i = 0;
    if (past_cache) {
      constexpr i64 item = sizeof(Y), bytes = LANES * item;
      const i64 odd = -reinterpret_cast<std::intptr_t>(y) & (bytes - 1);
      if (odd % item == 0 && odd / item <= n) {
        const First lanes{static_cast<int>(odd / item)};
        if (odd > 0) store(y, value(0, lanes), lanes);
        for (i = odd / item; i + LANES <= n; i += LANES) stream(y + i, value(i, All{}));
      }
    }
    for (; i + LANES <= n; i += LANES) store(y + i, value(i, All{}), All{});
    if (i < n) {
      const First lanes{static_cast<int>(n - i)};
      store(y + i, value(i, lanes), lanes);
    }
  });
}

template <class X, class Y, class P, class M>
INLINE void normalize_masked(const X* x, Y* y, i64 n, const P& p, const M& mask, Activation activation) {
  with_activation(activation, [&](auto a) {
    each(n, [&](i64 i, auto lanes) {
      F value;
      const F d = masked_deviation<X, decltype(lanes), P, M>(x, i, lanes, p, mask.valid(i, lanes), &value);
      store(y + i, activated<a()>(d * p.factor(i, lanes) + p.term(i, lanes)), lanes);
    });
  });
}

// Store g * factor - ((x - centre) * rstd * slope + offset), with g = `activation_vjp` of dy.
template <class X, class Y, class P, class T>
INLINE void input_gradient(
    const X* x, const Y* dy, X* dx, i64 n, const P& p, const T& t, Activation activation) {
  with_activation(activation, [&](auto a) {
    each(n, [&](i64 i, auto lanes) {
      const F d = load(x + i, lanes) - p.centre(i, lanes), factor = p.factor(i, lanes);
      const F g = activation_vjp<a()>(d * factor + p.term(i, lanes), load(dy + i, lanes));
      const F back = d * t.rstd(i, lanes) * t.slope(i, lanes) + t.offset(i, lanes);
      store(dx + i, g * factor - back, lanes);
    });
  });
}

// The same with a mask: the statistics depend on valid elements only, and a masked-out element that
// is not finite was replaced by 0, and has no gradient.
template <class X, class Y, class P, class T, class M>
INLINE void input_gradient_masked(
    const X* x, const Y* dy, X* dx, i64 n, const P& p, const T& t, const M& mask, Activation activation) {
  with_activation(activation, [&](auto a) {
    each(n, [&](i64 i, auto lanes) {
      F value;
      const I valid = mask.valid(i, lanes);
      const F d = masked_deviation<X, decltype(lanes), P, M>(x, i, lanes, p, valid, &value);
      const F factor = p.factor(i, lanes);
      const F g = activation_vjp<a()>(d * factor + p.term(i, lanes), load(dy + i, lanes));
      const F back = select(valid, d * t.rstd(i, lanes) * t.slope(i, lanes) + t.offset(i, lanes), F{});
      store(dx + i, select(valid | is_finite(value), g * factor - back, F{}), lanes);
    });
  });
}

}  // namespace GROUPNORM_ISA
}  // namespace groupnorm
