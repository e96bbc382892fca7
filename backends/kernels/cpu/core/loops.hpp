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

// What normalizes elements, and what the gradient of x needs besides; see `Affine` and `Through`.
struct Factors {
  F centre, factor, term;
};

struct Backs {
  F rstd, slope, offset;
};

struct Same {
  Factors factors;

  explicit Same(Affine a) : factors{all(a.centre), all(a.factor), all(a.term)} {}
  template <class L> INLINE Factors at(i64, L) const { return factors; }
};

struct SameBacks {
  Backs backs;

  explicit SameBacks(Through t) : backs{all(t.rstd), all(t.slope), all(t.offset)} {}
  template <class L> INLINE Backs at(i64, L) const { return backs; }
};

struct Table {
  float *centres, *factors, *terms;

  template <class L> INLINE Factors at(i64 i, L lanes) const {
    return {load(centres + i, lanes), load(factors + i, lanes), load(terms + i, lanes)};
  }
};

struct BacksTable {
  float *rstds, *slopes, *offsets;

  template <class L> INLINE Backs at(i64 i, L lanes) const {
    return {load(rstds + i, lanes), load(slopes + i, lanes), load(offsets + i, lanes)};
  }
};

struct Bytes {
  const std::uint8_t* bytes;
  template <class L> INLINE I valid(i64 i, L lanes) const { return is_valid(bytes + i, lanes); }
};

struct Invalid {
  template <class L> INLINE I valid(i64, L) const { return I{}; }
};

// x, its deviation from the centre, and activation's argument.
struct Element {
  F value, deviation, z;
};

template <class X, class L>
INLINE Element element(const X* x, L lanes, const Factors& f) {
  const F value = load(x, lanes), d = value - f.centre;
  return {value, d, d * f.factor + f.term};
}

// The same, bounded where x is masked out.
template <class X, class L>
INLINE Element masked_element(const X* x, L lanes, const Factors& f, I valid) {
  const F value = load(x, lanes);
  const F limit = min(all(5e33f), 1e38f / max(abs(f.factor), all(1)));
  const F bounded = min(max(select(is_finite(value), value, F{}) - f.centre, -limit), limit);
  const F d = select(valid, value - f.centre, bounded);
  return {value, d, d * f.factor + f.term};
}

// The period of factors that are the same for all elements.
constexpr i64 NO_PERIOD = i64{1} << 60;

// Lines of memory are written as a whole, from rows of so many elements on.
constexpr i64 LONG_ROW = 8 * LANES;

// Loops take copies of factors: a store could otherwise change them, for all that a compiler knows.

// Store `value(i, o, lanes)`, of n elements: o is i modulo the length of tables, `period`, which
// continue for one more vector. Four periods at a time, so that tables are read once for all four.
// If `past_cache`, nothing is written to the cache.
template <class Y, class Read, class Value>
INLINE void write(Y* y, i64 n, i64 period, bool past_cache, Read read, Value value) {
  constexpr i64 bytes = LANES * sizeof(Y);
  const i64 odd = -reinterpret_cast<std::intptr_t>(y) & (bytes - 1);
  const bool aligned = n >= LONG_ROW && odd % static_cast<i64>(sizeof(Y)) == 0;
  i64 i = aligned ? odd / static_cast<i64>(sizeof(Y)) : 0, o = i;
  const bool streams = past_cache && aligned;
  if (i > 0) {
    const First lanes{static_cast<int>(i)};
    store(y, value(0, read(0, lanes), lanes), lanes);
  }
  const auto put = [=](i64 i, F a) {
    if (streams) {
      stream(y + i, a);
    } else {
      store(y + i, a, All{});
    }
  };
  if (!streams && period % LANES == 0) {
    for (; 4 * period <= n - i; i += 4 * period) {
      for (i64 j = 0; j < period; j += LANES) {
        const auto tables = read(o + j < period ? o + j : o + j - period, All{});
        for (int k = 0; k < 4; ++k) put(i + k * period + j, value(i + k * period + j, tables, All{}));
      }
    }
  }
  for (; i + LANES <= n; i += LANES) {
    put(i, value(i, read(o, All{}), All{}));
    o += LANES;
    o = o < period ? o : o - period;
  }
  if (i < n) {
    const First lanes{static_cast<int>(n - i)};
    store(y + i, value(i, read(o, lanes), lanes), lanes);
  }
}

// Store y = activation((x - centre) * factor + term).
template <class X, class Y, class P>
INLINE void normalize(const X* x, Y* y, i64 n, i64 period, const P& p, Activation activation, bool past_cache) {
  with_activation(activation, [&](auto a) {
    write(y, n, period, past_cache, [p](i64 o, auto lanes) { return p.at(o, lanes); },
          [=](i64 i, const Factors& f, auto lanes) { return activated<a()>(element(x + i, lanes, f).z); });
  });
}

template <class X, class Y, class P, class M>
INLINE void normalize_masked(const X* x, Y* y, i64 n, const P& p, const M& mask, Activation activation) {
  with_activation(activation, [&](auto a) {
    each(n, [=](i64 i, auto lanes) {
      const Element e = masked_element(x + i, lanes, p.at(i, lanes), mask.valid(i, lanes));
      store(y + i, activated<a()>(e.z), lanes);
    });
  });
}

// Store g * factor - ((x - centre) * rstd * slope + offset), with g = `activation_vjp` of dy.
template <class X, class Y, class P, class T>
INLINE void input_gradient(
    const X* x, const Y* dy, X* dx, i64 n, i64 period, const P& p, const T& t, Activation activation,
    bool past_cache) {
  struct Both {
    Factors f;
    Backs b;
  };
  with_activation(activation, [&](auto a) {
    write(dx, n, period, past_cache, [p, t](i64 o, auto lanes) { return Both{p.at(o, lanes), t.at(o, lanes)}; },
          [=](i64 i, const Both& both, auto lanes) {
            const Element e = element(x + i, lanes, both.f);
            const F g = activation_vjp<a()>(e.z, load(dy + i, lanes));
            return g * both.f.factor - (e.deviation * both.b.rstd * both.b.slope + both.b.offset);
          });
  });
}

// The same with a mask: the statistics depend on valid elements only, and a masked-out element that
// is not finite was replaced by 0, and has no gradient.
template <class X, class Y, class P, class T, class M>
INLINE void input_gradient_masked(
    const X* x, const Y* dy, X* dx, i64 n, const P& p, const T& t, const M& mask, Activation activation) {
  with_activation(activation, [&](auto a) {
    each(n, [=](i64 i, auto lanes) {
      const I valid = mask.valid(i, lanes);
      const Factors f = p.at(i, lanes);
      const Backs b = t.at(i, lanes);
      const Element e = masked_element(x + i, lanes, f, valid);
      const F g = activation_vjp<a()>(e.z, load(dy + i, lanes));
      const F back = select(valid, e.deviation * b.rstd * b.slope + b.offset, F{});
      store(dx + i, select(valid | is_finite(e.value), g * f.factor - back, F{}), lanes);
    });
  });
}

}  // namespace GROUPNORM_ISA
}  // namespace groupnorm
