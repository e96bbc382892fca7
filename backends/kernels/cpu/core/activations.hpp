// Activations and their derivatives, of vectors.

#pragma once

#include "vectors.hpp"

namespace groupnorm {
namespace GROUPNORM_ISA {

// exp of x clamped to [-87, 87], with a relative error of at most 1e-7 + |x| * 3e-8: the polynomial
// of Cephes, after one step of Cody-Waite reduction.
INLINE F exp(F x) {
  x = min(max(x, all(-87)), all(87));
  // Adding 1.5 * 2**23 rounds to an integer, which is then in the lowest bits.
  const F shifted = x * 1.44269504088896341f + 12582912.0f;
  const F r = x - (shifted - 12582912.0f) * 0.69314718056f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  return from_bits(bits_of(p) + (bits_of(shifted) << 23));
}

INLINE F sigmoid(F x) { return 1.0f / (1.0f + exp(-x)); }

// log(erfc(z) / t) + z**2 in powers of u = 2 t - 1, with t = 2 / (2 + z): `erfc.py` has them too.
constexpr float ERFC_POWERS[12] = {
    -0.6717941f, 0.6726431f, 0.047343887f, -0.04689364f, -0.009880019f, 0.008808825f,
    0.0017940663f, -0.0022887653f, -0.00022791096f, 0.00057376636f, 8.0007385e-06f, -8.728381e-05f,
};

// The standard normal distribution function; `bell` is exp(-z**2 / 2).
INLINE F normal_cdf(F z, F bell) {
  const F t = 2.0f / (2.0f + abs(z) * 0.70710678118654752f);
  const F u = 2.0f * t - 1.0f;
  F p = all(ERFC_POWERS[11]);
  for (int i = 10; i >= 0; --i) p = p * u + ERFC_POWERS[i];
  const F tail = 0.5f * t * exp(p) * bell;
  return select(z > 0.0f, 1.0f - tail, tail);
}

// NaN stays NaN: a comparison with it is false.
INLINE F at_least(F z, float bound) { return select(z < bound, all(bound), z); }
INLINE F bounded(F z, float bound) { return at_least(select(z > bound, all(bound), z), -bound); }

template <Activation A>
INLINE F activated(F z) {
  if constexpr (A == Activation::relu) return select(z < 0.0f, F{}, z);
  if constexpr (A == Activation::silu) return at_least(z, -87) * sigmoid(z);  // beyond, exp is clamped
  if constexpr (A == Activation::gelu) {
    z = at_least(z, -40);  // avoids inf * 0
    return z * normal_cdf(z, exp(-0.5f * z * z));
  }
  return z;
}

// dy times the derivative of the activation at z.
template <Activation A>
INLINE F activation_vjp(F z, F dy) {
  if constexpr (A == Activation::relu) return select(z > 0.0f, dy, F{});
  if constexpr (A == Activation::silu) {
    const F s = sigmoid(z);
    return dy * (s * (1.0f + bounded(z, 87) * (1.0f - s)));  // avoids inf * 0
  }
  if constexpr (A == Activation::gelu) {
    const F bell = exp(-0.5f * z * z);
    const F near = bounded(z, 40);  // avoids inf * 0; beyond, the product is 0
    return dy * (normal_cdf(z, bell) + near * bell * 0.39894228040143268f);
  }
  return dy;
}

// Call f with an activation that is known when it is compiled: so loops have no branches.
template <class Function>
INLINE void with_activation(Activation activation, Function f) {
  switch (activation) {
    case Activation::none: return f(std::integral_constant<Activation, Activation::none>{});
    case Activation::relu: return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::silu: return f(std::integral_constant<Activation, Activation::silu>{});
    case Activation::gelu: return f(std::integral_constant<Activation, Activation::gelu>{});
  }
}

}  // namespace GROUPNORM_ISA
}  // namespace groupnorm
