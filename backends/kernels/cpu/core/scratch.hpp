// How a call is divided into tasks, by its shape alone, and the memory that its threads share.
//
// A division that depended on the number of threads would make results depend on it.

#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

#include "call.hpp"
#include "sharing.hpp"

namespace groupnorm {

// The least elements of one task.
constexpr i64 GRAIN = 16384;

// The gradients of scale and bias are added up over spans of samples first, in float64. Spans have
// this many positions at least, so that their sums are small in comparison with x, if there are
// enough samples for this many spans, which threads share.
constexpr i64 SPAN_POSITIONS = 512, MIN_SPANS = 16;

// Channels last: samples of up to this many elements are processed by one thread each, in its own
// cache, if there are many; threads process larger samples together, one after the other.
constexpr i64 SMALL_SAMPLE = 1 << 18, FEW_SAMPLES = 8, SMALL_SAMPLE_OF_FEW = 1 << 15;
// A band is several rows: long enough for a loop, short enough for tables of its length to stay in
// the fastest cache. A chunk, several bands, is measured by one thread.
constexpr i64 LONGEST_VECTOR = 16;
constexpr i64 BAND = 512, CHUNK = 65536, MIN_CHUNK_ROWS = 256;

inline i64 quotient_up(i64 a, i64 b) { return (a + b - 1) / b; }

class Scratch {
 public:
  i64 tasks = 0;           // of a round in which threads process whole samples or groups
  i64 grain = 1;           // groups, or samples, of such a task
  i64 spans = 0;           // of all batches
  // Channels last:
  bool whole_samples = false;
  i64 band_rows = 0, width = 0;        // of a band, in rows and in elements
  i64 table_length = 0;                // the width, and a vector more
  i64 chunk_rows = 0, chunks = 0;      // of a sample
  float* chunk_sums = nullptr;         // (chunks, 2, channels)
  double* chunk_moments = nullptr;     // (chunks, groups, 2)
  double* chunk_counts = nullptr;      // (chunks)
  double* sample_statistics = nullptr; // (groups, 2): mean, rstd
  double* group_means = nullptr;       // (groups, 2)
  double* sample_sums = nullptr;       // (2, channels)

  explicit Scratch(const Call& call) : parts_(call.threads) {
    const Shape& shape = call.shape;
    batch_samples_ = shape.samples / call.batches;
    divide(call);
    place(call, nullptr);
    memory_.reset(static_cast<std::byte*>(::operator new(size_, std::align_val_t(LINE))));
    place(call, memory_.get());
    for (i64 i = 0; i < counters_; ++i) new (first_counter_ + i) Counter;
  }

  std::size_t size() const { return size_; }

  Round round(i64 number) const { return {first_counter_ + number * Round::counters_of(parts_), parts_}; }

  // The tables of one thread: floats, (tables, width), and doubles, (2, channels).
  float* tables(int part) const { return tables_ + part * tables_each_; }
  double* channel_sums(int part) const { return channel_sums_ + part * channel_sums_each_; }
  // Pairs of each group: (2, groups).
  double* thread_group_means(int part) const { return thread_means_ + part * thread_means_each_; }
  double* thread_merged(int part) const { return thread_group_means(part) + 2 * groups_; }
  double* thread_totals(int part) const { return channel_sums(part) + 2 * channels_; }

  // Spans: samples whose gradients of scale and bias are added up first; no span has two batches.
  i64 first_sample(i64 span) const {
    const i64 in_batch = spans / batches();
    return span / in_batch * batch_samples_ + span % in_batch * span_samples_;
  }
  i64 end_sample(i64 span) const {
    const i64 in_batch = spans / batches(), begin = span / in_batch * batch_samples_;
    return begin + std::min(batch_samples_, (span % in_batch + 1) * span_samples_);
  }

  // Add the sums of a channel of a sample to those of its span; only one thread may add to a span.
  void add_sums(const Call& call, i64 sample, i64 span, i64 channel, double total, double weighted) {
    const i64 channels = call.shape.channels();
    if (!(call.stages & INPUT_GRADIENT)) {
      call.sum_dy[sample * channels + channel] = total;
      call.sum_dy_xhat[sample * channels + channel] = weighted;
      return;
    }
    double* sums = span_sums_ + span * 2 * channels + channel;
    const bool first = sample == first_sample(span);
    sums[0] = total + (first ? 0 : sums[0]);
    sums[channels] = weighted + (first ? 0 : sums[channels]);
  }

  // The same where threads process one sample after the other: without spans.
  void add_to_batch(const Call& call, i64 sample, const double* total, const double* weighted) {
    const i64 channels = call.shape.channels(), in_batch = sample % batch_samples_;
    if (!(call.stages & INPUT_GRADIENT)) {
      std::copy_n(total, channels, call.sum_dy + sample * channels);
      std::copy_n(weighted, channels, call.sum_dy_xhat + sample * channels);
      return;
    }
    double* batch = sample_sums + 2 * channels;
    const i64 at = sample / batch_samples_ * channels;
    for (i64 c = 0; c < channels; ++c) {
      batch[c] = total[c] + (in_batch == 0 ? 0 : batch[c]);
      batch[channels + c] = weighted[c] + (in_batch == 0 ? 0 : batch[channels + c]);
      if (in_batch == batch_samples_ - 1) {
        call.dbias[at + c] = static_cast<float>(batch[c]);
        call.dscale[at + c] = static_cast<float>(batch[channels + c]);
      }
    }
  }

  // Add the spans of each batch, into the gradients.
  void add_spans(const Call& call, i64 channels) const {
    if ((call.stages & BACKWARD) != BACKWARD) return;
    const i64 each = spans / batches();
    for (i64 batch = 0; batch < batches(); ++batch) {
      for (i64 c = 0; c < channels; ++c) {
        double bias = 0, scale = 0;
        for (i64 span = batch * each; span < (batch + 1) * each; ++span) {
          bias += span_sums_[span * 2 * channels + c];
          scale += span_sums_[(span * 2 + 1) * channels + c];
        }
        call.dbias[batch * channels + c] = static_cast<float>(bias);
        call.dscale[batch * channels + c] = static_cast<float>(scale);
      }
    }
  }

 private:
  i64 batches() const { return batches_; }

  // Whether threads share groups, not samples or rows.
  static bool by_groups(const Shape& shape) { return shape.channels_first && shape.positions > 1; }

  void divide(const Call& call) {
    const Shape& shape = call.shape;
    batches_ = call.batches, channels_ = shape.channels(), groups_ = shape.groups;
    const i64 in_batch = std::max<i64>(
        std::min(batch_samples_, MIN_SPANS), batch_samples_ * shape.positions / SPAN_POSITIONS);
    span_samples_ = quotient_up(batch_samples_, std::min(in_batch, batch_samples_));
    spans = batches_ * quotient_up(batch_samples_, span_samples_);
    rounds_ = 1;
    const bool backward = !call.forward();
    if (by_groups(shape)) {
      const i64 samples = backward ? span_samples_ : 1;
      grain = std::max<i64>(1, GRAIN / (shape.stretch() * samples));
      tasks = quotient_up((backward ? spans : shape.samples) * shape.groups, grain);
      return;
    }
    const i64 channels = shape.channels(), positions = shape.positions;
    // With a mask, rows are processed one by one.
    band_rows = call.mask ? 1 : std::max(quotient_up(LONGEST_VECTOR, channels), std::min(BAND / channels, positions / 16));
    width = band_rows * channels;
    table_length = quotient_up(width, LONGEST_VECTOR) * LONGEST_VECTOR + LONGEST_VECTOR;
    const i64 least = MIN_CHUNK_ROWS * 4 / item_bytes(call.x_dtype);
    const i64 rows = std::max(least, CHUNK / channels) / band_rows * band_rows;
    chunk_rows = std::min(std::max(rows, band_rows), quotient_up(positions, band_rows) * band_rows);
    chunks = quotient_up(positions, chunk_rows);
    const i64 elements = channels * positions;
    whole_samples = positions == 1 ||
        elements <= (shape.samples >= FEW_SAMPLES ? SMALL_SAMPLE : SMALL_SAMPLE_OF_FEW);
    if (whole_samples) {
      grain = backward ? 1 : std::max<i64>(1, GRAIN / elements);
      tasks = backward ? spans : quotient_up(shape.samples, grain);
    } else {
      rounds_ = 2 * shape.samples;
    }
  }

  template <class T>
  T* take(std::byte* base, i64 count) {
    T* found = base ? reinterpret_cast<T*>(base + size_) : nullptr;
    size_ += quotient_up(count * static_cast<i64>(sizeof(T)), LINE) * LINE;
    return found;
  }

  void place(const Call& call, std::byte* base) {
    const Shape& shape = call.shape;
    const i64 channels = shape.channels(), groups = shape.groups;
    const bool backward = !call.forward();
    size_ = 0;
    counters_ = rounds_ * Round::counters_of(parts_);
    first_counter_ = take<Counter>(base, counters_);
    const bool by_spans = backward && (by_groups(shape) || whole_samples);
    span_sums_ = take<double>(base, by_spans && call.stages == BACKWARD ? spans * 2 * channels : 0);
    if (by_groups(shape)) return;
    // Whole lines for each thread, so that no two write to the same.
    tables_each_ = (backward ? 6 : 3) * table_length;
    tables_ = take<float>(base, parts_ * tables_each_);
    channel_sums_each_ = quotient_up((backward ? 4 : 2) * channels, 8) * 8;
    channel_sums_ = take<double>(base, parts_ * channel_sums_each_);
    thread_means_each_ = quotient_up(4 * groups, 8) * 8;
    thread_means_ = take<double>(base, parts_ * thread_means_each_);
    if (whole_samples) return;
    sample_statistics = take<double>(base, 2 * groups);
    if (backward) {
      chunk_sums = take<float>(base, chunks * 2 * channels);
      group_means = take<double>(base, 2 * groups);
      sample_sums = take<double>(base, 4 * channels);
    } else {
      chunk_moments = take<double>(base, chunks * groups * 2);
      chunk_counts = take<double>(base, chunks);
    }
  }

  struct Delete {
    void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t(LINE)); }
  };

  int parts_;
  i64 channels_ = 0, groups_ = 0, batches_ = 1, batch_samples_ = 0, span_samples_ = 1, rounds_ = 1, counters_ = 0;
  std::size_t size_ = 0;
  std::unique_ptr<std::byte, Delete> memory_;
  Counter* first_counter_ = nullptr;
  double *span_sums_ = nullptr, *channel_sums_ = nullptr, *thread_means_ = nullptr;
  float* tables_ = nullptr;
  i64 tables_each_ = 0, channel_sums_each_ = 0, thread_means_each_ = 0;
};

}  // namespace groupnorm
