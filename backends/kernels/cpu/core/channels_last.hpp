// Channels last: each channel is measured separately, one chunk of rows at a time.
//
// The channels of a chunk are merged into groups, and the chunks of a sample, in float64 by the
// formula of Chan, Golub and LeVeque; then all rows are normalized, from the last chunk, which is
// still in a cache. A chunk is read once for its statistics: its channels are measured about the
// means of its first rows. Only if one of these turns out to be far from the chunk's own mean
// (`centre_is_poor`) is the chunk measured again.
//
// Rows of few channels are short, so loops run over a *band* of several rows at once, together with
// tables that repeat each per-channel value for every row. Sums take four bands at once, so that
// totals are read and written once for all four. These are a quarter of a chunk apart: memory is fast
// when it is read in a few long streams.
//
// Threads share the chunks of one sample after the other, so that a sample stays in a cache; small
// samples are processed by one thread each.

#pragma once

#include "loops.hpp"
#include "scratch.hpp"
#include "sharing.hpp"

namespace groupnorm {
namespace GROUPNORM_ISA {

// Sums are added in float32 over this many sets of four bands, and then in float64.
constexpr i64 RUN = 32;

// A chunk of rows of one sample.
template <class X>
struct Chunk {
  const X* x;
  const std::uint8_t* valid;  // of its first row, or null
  i64 rows, channels, width;

  i64 band_rows() const { return width / channels; }
  i64 remainder() const { return rows * channels % width; }
};

// Call `four` with the offsets of four bands, `one` with the offset and length of one (or of a rest
// that is shorter), `invalid` with those of a masked-out row, and `flush` after every run.
template <class X, class Four, class One, class Invalid, class Flush>
INLINE void each_band(const Chunk<X>& chunk, Four four, One one, Invalid invalid, Flush flush) {
  const i64 width = chunk.width, bands = chunk.rows / chunk.band_rows();
  i64 sets = 0;
  const auto after_set = [&] {
    if (++sets == RUN) {
      flush();
      sets = 0;
    }
  };
  if (chunk.valid == nullptr) {
    const i64 quarter = bands / 4 * width;
    for (i64 a = 0; a < quarter; a += width) {
      four(a, a + quarter, a + 2 * quarter, a + 3 * quarter);
      after_set();
    }
    for (i64 a = 4 * quarter; a < bands * width; a += width) one(a, width);
    if (chunk.remainder() > 0) one(bands * width, chunk.remainder());
  } else {  // a band is a row
    i64 found[4], count = 0;
    for (i64 row = 0; row < chunk.rows; ++row) {
      if (!chunk.valid[row]) {
        invalid(row * width, width);
        if (row % (4 * RUN) == 4 * RUN - 1) flush();
        continue;
      }
      found[count++] = row * width;
      if (count < 4) continue;
      four(found[0], found[1], found[2], found[3]);
      after_set();
      count = 0;
    }
    for (i64 i = 0; i < count; ++i) one(found[i], width);
  }
  flush();
}

// Add a band's sums over its rows to `out`, one value for each channel; clear them.
inline void add_rows(float* sums, i64 width, i64 channels, double* out) {
  for (i64 begin = 0; begin < width; begin += channels) {
    for (i64 c = 0; c < channels; ++c) {
      out[c] += sums[begin + c];
      sums[begin + c] = 0;
    }
  }
}

// Copy the first row of a table to its other rows.
inline void repeat_row(float* table, i64 length, i64 channels) {
  for (i64 i = channels; i < length; ++i) table[i] = table[i - channels];
}

// Statistics ---------------------------------------------------------------------------------------

// The buffers of one thread.
struct Buffers {
  float *one, *two, *three;  // tables
  double *sums, *squares;    // of each channel
};

template <class X>
void add_moments(const X* x, i64 n, const float* centre, float* total, float* squares) {
  each(n, [&](i64 i, auto lanes) {
    const F d = load(x + i, lanes) - load(centre + i, lanes);
    store(total + i, load(total + i, lanes) + d, lanes);
    store(squares + i, load(squares + i, lanes) + d * d, lanes);
  });
}

template <class X>
void add_moments_of_four(
    const X* x, i64 a, i64 b, i64 c, i64 d, i64 n, const float* centre, float* total, float* squares) {
  each(n, [&](i64 i, auto lanes) {
    const F k = load(centre + i, lanes);
    const F e = load(x + a + i, lanes) - k, f = load(x + b + i, lanes) - k;
    const F g = load(x + c + i, lanes) - k, h = load(x + d + i, lanes) - k;
    store(total + i, load(total + i, lanes) + ((e + f) + (g + h)), lanes);
    store(squares + i, load(squares + i, lanes) + ((e * e + f * f) + (g * g + h * h)), lanes);
  });
}

// Set the centres to the means of the first valid rows; return whether there are any.
template <class X>
bool set_centres(const Chunk<X>& chunk, float* centre, double* total) {
  i64 rows = 0;
  const i64 wanted = std::max<i64>(8, 4 * chunk.band_rows());
  std::fill_n(total, chunk.channels, 0.0);
  for (i64 row = 0; row < chunk.rows && rows < wanted; ++row) {
    if (chunk.valid != nullptr && !chunk.valid[row]) continue;
    const X* x = chunk.x + row * chunk.channels;
    if (rows == 0) each(chunk.channels, [&](i64 i, auto lanes) { store(centre + i, load(x + i, lanes), lanes); });
    for (i64 c = 0; c < chunk.channels; ++c) total[c] += scalar(x[c]) - centre[c];
    ++rows;
  }
  if (rows == 0) return false;
  for (i64 c = 0; c < chunk.channels; ++c) centre[c] += static_cast<float>(total[c] / static_cast<double>(rows));
  repeat_row(centre, chunk.width, chunk.channels);
  return true;
}

template <class X>
void take_moments(const Chunk<X>& chunk, const Buffers& b) {
  std::fill_n(b.two, chunk.width, 0.0f);
  std::fill_n(b.three, chunk.width, 0.0f);
  std::fill_n(b.sums, chunk.channels, 0.0);
  std::fill_n(b.squares, chunk.channels, 0.0);
  each_band(
      chunk,
      [&](i64 p, i64 q, i64 r, i64 s) {
        add_moments_of_four(chunk.x, p, q, r, s, chunk.width, b.one, b.two, b.three);
      },
      [&](i64 at, i64 n) { add_moments(chunk.x + at, n, b.one, b.two, b.three); }, [](i64, i64) {},
      [&] {
        add_rows(b.two, chunk.width, chunk.channels, b.sums);
        add_rows(b.three, chunk.width, chunk.channels, b.squares);
      });
}

// Measure the groups of a chunk: mean and M2 of each; return the number of rows that count.
template <class X>
double measure_chunk(const Chunk<X>& chunk, const Shape& shape, const Buffers& b, double* found) {
  const i64 valid = chunk.valid ? count_valid(chunk.valid, chunk.rows) : chunk.rows;
  if (valid == 0 || !set_centres(chunk, b.one, b.sums)) return 0;
  const double n = static_cast<double>(valid), inverse = 1 / n;
  for (int attempt = 0; attempt < 2; ++attempt) {
    take_moments(chunk, b);
    bool poor = false;
    for (i64 c = 0; c < chunk.channels; ++c) poor |= centre_is_poor(b.sums[c], b.sums[c] * inverse, b.squares[c]);
    if (!poor || attempt == 1) break;
    for (i64 c = 0; c < chunk.channels; ++c) b.one[c] += static_cast<float>(b.sums[c] * inverse);
    repeat_row(b.one, chunk.width, chunk.channels);
  }
  for (i64 c = 0; c < chunk.channels; ++c) {
    const double shift = b.sums[c] * inverse, m2 = b.squares[c] - b.sums[c] * shift;
    b.sums[c] = b.one[c] + shift;
    b.squares[c] = m2 < 0 ? 0 : m2;  // this comparison keeps NaN
  }
  for (i64 group = 0; group < shape.groups; ++group) {
    const double *means = b.sums + group * shape.size, *m2s = b.squares + group * shape.size;
    double shift = 0, m2 = 0;
    for (i64 c = 1; c < shape.size; ++c) shift += means[c] - means[0];
    const double mean = means[0] + shift / static_cast<double>(shape.size);
    for (i64 c = 0; c < shape.size; ++c) m2 += m2s[c] + n * (means[c] - mean) * (means[c] - mean);
    found[2 * group] = mean;
    found[2 * group + 1] = m2;
  }
  return n;
}

// Merge the statistics of a chunk's groups, of `n` rows, into those before it, of `count` rows.
inline void merge_chunk(const Shape& shape, double count, double n, const double* found, double* into) {
  for (i64 group = 0; group < shape.groups; ++group) {
    const double size = static_cast<double>(shape.size);
    Statistics s = {count * size, into[2 * group], into[2 * group + 1]};
    merge(s, n * size, found[2 * group], found[2 * group + 1]);
    into[2 * group] = s.mean;
    into[2 * group + 1] = s.m2;
  }
}

// Turn a sample's means and M2, of `count` rows, into mean and 1 / standard deviation.
template <class X>
void finish_statistics(const Call& call, i64 sample, double count, double* statistics) {
  const Shape& shape = call.shape;
  const i64 channels = shape.channels();
  const X* x = static_cast<const X*>(call.x) + sample * channels * shape.positions;
  for (i64 group = 0; group < shape.groups; ++group) {
    Statistics s = {0, 0, 0};
    if (count > 0) {
      s = {count * static_cast<double>(shape.size), statistics[2 * group], statistics[2 * group + 1]};
      if (is_out_of_range(s.variance())) {
        s = in_float64(x + group * shape.size, shape.positions, channels, shape.size, call.mask_of(sample), true);
      }
    }
    statistics[2 * group] = s.mean;
    statistics[2 * group + 1] = keep(call, sample * shape.groups + group, s);
  }
}

// Normalizing --------------------------------------------------------------------------------------

// Fill the tables that normalize a sample, given (mean, rstd) of each group.
inline void set_tables(const Call& call, i64 sample, i64 length, const double* statistics, const Table& t) {
  const Shape& shape = call.shape;
  const i64 channels = shape.channels();
  const float *scale = call.scale_of(sample), *bias = call.bias_of(sample);
  for (i64 group = 0, c = 0; group < shape.groups; ++group) {
    for (i64 i = 0; i < shape.size; ++i, ++c) {
      const Affine a = affine(statistics[2 * group], statistics[2 * group + 1], at(scale, c, 1), at(bias, c, 0));
      t.centres[c] = a.centre, t.factors[c] = a.factor, t.terms[c] = a.term;
    }
  }
  for (float* table : {t.centres, t.factors, t.terms}) repeat_row(table, length, channels);
}

// Call `valid` with the offset and length of all elements of a chunk or, with a mask, of each row that
// counts, and `invalid` with those of the others.
template <class X, class Valid, class Invalid>
INLINE void each_row(const Chunk<X>& chunk, Valid valid, Invalid invalid) {
  if (chunk.valid == nullptr) return valid(0, chunk.rows * chunk.channels);
  for (i64 row = 0; row < chunk.rows; ++row) {
    if (chunk.valid[row]) {
      valid(row * chunk.channels, chunk.channels);
    } else {
      invalid(row * chunk.channels, chunk.channels);
    }
  }
}

template <class X, class Y>
void normalize_chunk(const Call& call, const Chunk<X>& chunk, Y* y, const Table& t) {
  each_row(chunk, [&](i64 a, i64 n) {
    normalize(chunk.x + a, y + a, n, chunk.width, t, call.activation, call.past_cache());
  }, [&](i64 a, i64 n) {
    normalize_masked(chunk.x + a, y + a, n, t, Invalid{}, call.activation);
  });
}

// What a thread processes, and with what.
template <class X>
struct Chunks {
  const Call& call;
  const Scratch& scratch;

  i64 offset(i64 sample, i64 number) const {
    return (sample * call.shape.positions + number * scratch.chunk_rows) * call.shape.channels();
  }
  Chunk<X> operator()(i64 sample, i64 number) const {
    const i64 first = number * scratch.chunk_rows;
    const std::uint8_t* mask = call.mask_of(sample);
    return {static_cast<const X*>(call.x) + offset(sample, number), mask ? mask + first : nullptr,
            std::min(scratch.chunk_rows, call.shape.positions - first), call.shape.channels(), scratch.width};
  }
};

inline void given_statistics(const Call& call, i64 sample, double* statistics) {
  for (i64 group = 0; group < call.shape.groups; ++group) {
    statistics[2 * group] = call.mean[sample * call.shape.groups + group];
    statistics[2 * group + 1] = call.rstd[sample * call.shape.groups + group];
  }
}

template <class X, class Y>
void channels_last_forward(const Call& call, Scratch& scratch, int part) {
  const Shape& shape = call.shape;
  const Chunks<X> chunks{call, scratch};
  const i64 length = scratch.table_length, groups = shape.groups;
  float* own = scratch.tables(part);
  double* sums = scratch.channel_sums(part);
  const Buffers buffers{own, own + length, own + 2 * length, sums, sums + shape.channels()};
  const Table table{own, own + length, own + 2 * length};
  Y* y = static_cast<Y*>(call.y);
  double *moments = scratch.chunk_moments(part), *counts = scratch.chunk_counts(part);
  double* statistics = call.stages & MEASURE ? scratch.sample_pairs(part) : scratch.thread_pairs(part);

  scratch.each_sample(call, part, [&](i64 sample, i64) {
    if (call.stages & MEASURE) {
      scratch.each_chunk(sample, part, [&](i64 number) {
        counts[number] = measure_chunk(chunks(sample, number), shape, buffers, moments + number * 2 * groups);
      }, [&] {
        double count = 0;
        std::fill_n(statistics, 2 * groups, 0.0);
        for (i64 number = 0; number < scratch.chunks; ++number) {
          if (counts[number] == 0) continue;
          merge_chunk(shape, count, counts[number], moments + number * 2 * groups, statistics);
          count += counts[number];
        }
        finish_statistics<X>(call, sample, count, statistics);
      });
    } else {
      given_statistics(call, sample, statistics);
    }
    if (!(call.stages & NORMALIZE)) return;
    bool ready = false;
    scratch.each_chunk_again(sample, part, [&](i64 number) {
      if (!ready) set_tables(call, sample, length, statistics, table);
      ready = true;
      normalize_chunk(call, chunks(sample, number), y + chunks.offset(sample, number), table);
    });
  }, [] {});
}

// Backward -----------------------------------------------------------------------------------------

template <Activation A, class X, class Y, class Read>
INLINE void add_products(
    const X* x, const Y* dy, i64 n, const Table& t, float* total, float* weighted, Read read) {
  each(n, [&](i64 i, auto lanes) {
    const Element e = read(x + i, lanes, t.at(i, lanes));
    const F g = activation_vjp<A>(e.z, load(dy + i, lanes));
    store(total + i, load(total + i, lanes) + g, lanes);
    store(weighted + i, load(weighted + i, lanes) + g * e.deviation, lanes);
  });
}

template <Activation A, class X, class Y>
INLINE void add_products_of_four(
    const X* x, const Y* dy, const i64 (&at)[4], i64 n, const Table& t, float* total, float* weighted) {
  each(n, [&](i64 i, auto lanes) {
    const Factors f = t.at(i, lanes);
    F d[4], g[4];
    for (int k = 0; k < 4; ++k) {
      const Element e = element(x + at[k] + i, lanes, f);
      d[k] = e.deviation;
      g[k] = activation_vjp<A>(e.z, load(dy + at[k] + i, lanes));
    }
    store(total + i, load(total + i, lanes) + ((g[0] + g[1]) + (g[2] + g[3])), lanes);
    const F products = (g[0] * d[0] + g[1] * d[1]) + (g[2] * d[2] + g[3] * d[3]);
    store(weighted + i, load(weighted + i, lanes) + products, lanes);
  });
}

// Sum g = `activation_vjp` of dy, and g * (x - centre), over each channel of a chunk.
template <class X, class Y>
void sum_products(const Call& call, const Chunk<X>& chunk, const Y* dy, const Table& t, const Buffers& b) {
  std::fill_n(b.one, chunk.width, 0.0f);
  std::fill_n(b.two, chunk.width, 0.0f);
  std::fill_n(b.sums, chunk.channels, 0.0);
  std::fill_n(b.squares, chunk.channels, 0.0);
  const auto plain = [](const X* x, auto lanes, const Factors& f) { return element(x, lanes, f); };
  const auto invalid = [](const X* x, auto lanes, const Factors& f) { return masked_element(x, lanes, f, I{}); };
  with_activation(call.activation, [&](auto a) {
    each_band(
        chunk,
        [&](i64 p, i64 q, i64 r, i64 s) {
          add_products_of_four<a()>(chunk.x, dy, {p, q, r, s}, chunk.width, t, b.one, b.two);
        },
        [&](i64 at, i64 n) { add_products<a()>(chunk.x + at, dy + at, n, t, b.one, b.two, plain); },
        [&](i64 at, i64 n) { add_products<a()>(chunk.x + at, dy + at, n, t, b.one, b.two, invalid); },
        [&] {
          add_rows(b.one, chunk.width, chunk.channels, b.sums);
          add_rows(b.two, chunk.width, chunk.channels, b.squares);
        });
  });
}

// Turn the sums of a sample, of g and g * (x - centre), into those of g and g * xhat, and into the
// means of scale times them over each group.
inline void finish_sums(const Call& call, i64 sample, double* total, double* weighted, double* means) {
  const Shape& shape = call.shape;
  const float* scale = call.scale_of(sample);
  for (i64 group = 0; group < shape.groups; ++group) {
    const i64 k = sample * shape.groups + group;
    const double mean = call.mean[k], rstd = call.rstd[k], share = call.inv_count[k];
    const double rest = mean - static_cast<double>(static_cast<float>(mean));
    double p = 0, q = 0;
    for (i64 c = group * shape.size; c < (group + 1) * shape.size; ++c) {
      weighted[c] = (weighted[c] - rest * total[c]) * rstd;
      p += at(scale, c, 1) * total[c] * share;
      q += at(scale, c, 1) * weighted[c] * share;
    }
    means[2 * group] = p, means[2 * group + 1] = q;
  }
}

inline void given_means(const Call& call, i64 sample, double* means) {
  for (i64 group = 0; group < call.shape.groups; ++group) {
    means[2 * group] = call.sum_dy[sample * call.shape.groups + group];
    means[2 * group + 1] = call.sum_dy_xhat[sample * call.shape.groups + group];
  }
}

inline void set_gradient_tables(
    const Call& call, i64 sample, i64 length, const double* means, const BacksTable& t) {
  const Shape& shape = call.shape;
  for (i64 group = 0, c = 0; group < shape.groups; ++group) {
    const i64 k = sample * shape.groups + group;
    const Through found = through(call.mean[k], call.rstd[k], means[2 * group], means[2 * group + 1]);
    for (i64 i = 0; i < shape.size; ++i, ++c) {
      t.rstds[c] = found.rstd, t.slopes[c] = found.slope, t.offsets[c] = found.offset;
    }
  }
  for (float* table : {t.rstds, t.slopes, t.offsets}) repeat_row(table, length, shape.channels());
}

template <class X, class Y>
void write_gradient(
    const Call& call, const Chunk<X>& chunk, const Y* dy, X* dx, const Table& t, const BacksTable& backs) {
  each_row(chunk, [&](i64 a, i64 n) {
    input_gradient(
        chunk.x + a, dy + a, dx + a, n, chunk.width, t, backs, call.activation, call.past_cache());
  }, [&](i64 a, i64 n) {
    input_gradient_masked(chunk.x + a, dy + a, dx + a, n, t, backs, Invalid{}, call.activation);
  });
}

template <class X, class Y>
void channels_last_backward(const Call& call, Scratch& scratch, int part) {
  const Shape& shape = call.shape;
  const Chunks<X> chunks{call, scratch};
  const i64 length = scratch.table_length, channels = shape.channels();
  float* own = scratch.tables(part);
  double* sums = scratch.channel_sums(part);
  const Table table{own, own + length, own + 2 * length};
  // Tables of the sums first, then of the factors.
  const Buffers buffers{own + 3 * length, own + 4 * length, own + 5 * length, sums, sums + channels};
  const BacksTable backs{own + 3 * length, own + 4 * length, own + 5 * length};
  const Y* dy = static_cast<const Y*>(call.dy);
  X* dx = static_cast<X*>(call.y);
  float* chunk_sums = scratch.chunk_sums(part);
  double *total = scratch.sample_sums(part), *weighted = total + channels;
  double* means = call.stages & SUM ? scratch.sample_pairs(part) : scratch.thread_pairs(part);

  scratch.each_sample(call, part, [&](i64 sample, i64 span) {
    bool has_table = false, has_backs = false;
    const auto set_table = [&] {
      if (has_table) return;
      double* statistics = scratch.thread_statistics(part);
      given_statistics(call, sample, statistics);
      set_tables(call, sample, length, statistics, table);
      has_table = true;
    };
    if (call.stages & SUM) {
      scratch.each_chunk(sample, part, [&](i64 number) {
        set_table();
        sum_products(call, chunks(sample, number), dy + chunks.offset(sample, number), table, buffers);
        std::copy_n(sums, 2 * channels, chunk_sums + number * 2 * channels);
      }, [&] {
        std::fill_n(total, 2 * channels, 0.0);
        for (i64 number = 0; number < scratch.chunks; ++number) {
          for (i64 c = 0; c < 2 * channels; ++c) total[c] += chunk_sums[number * 2 * channels + c];
        }
        finish_sums(call, sample, total, weighted, means);
        for (i64 c = 0; c < channels; ++c) scratch.add_sums(call, sample, span, c, total[c], weighted[c]);
      });
    } else {
      given_means(call, sample, means);
    }
    if (!(call.stages & INPUT_GRADIENT)) return;
    scratch.each_chunk_again(sample, part, [&](i64 number) {
      set_table();
      if (!has_backs) set_gradient_tables(call, sample, length, means, backs);
      has_backs = true;
      const i64 at = chunks.offset(sample, number);
      write_gradient(call, chunks(sample, number), dy + at, dx + at, table, backs);
    });
  }, [&] { scratch.add_spans(call, channels); });
}

}  // namespace GROUPNORM_ISA
}  // namespace groupnorm
