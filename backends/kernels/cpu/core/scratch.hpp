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
  i64 tasks = 0;  // of a round in which threads process whole samples or groups
  i64 grain = 1;  // groups, or samples, of such a task
  i64 spans = 0;  // of all batches
  // Channels last:
  i64 width = 0;         // of a band, in elements
  i64 table_length = 0;  // the width, and a vector more
  i64 chunk_rows = 0, chunks = 0;  // of a sample

  explicit Scratch(const Call& call) : parts_(call.threads) {
    divide(call);
    place(call, nullptr);
    memory_.reset(static_cast<std::byte*>(::operator new(size_, std::align_val_t(LINE))));
    place(call, memory_.get());
    for (i64 i = 0; i < counters_; ++i) new (first_counter_ + i) Counter;
  }

  std::size_t size() const { return size_; }

  Round round(i64 number) const { return {first_counter_ + number * Round::counters_of(parts_), parts_}; }

  // Run `one_sample`, with the numbers of a sample and of its span, for all samples: each in one
  // thread, or one after the other in all threads. `last` runs when all are done.
  template <class Sample, class Last>
  void each_sample(const Call& call, int part, Sample one_sample, Last last) const {
    const i64 samples = call.shape.samples;
    if (!whole_samples_) {
      for (i64 sample = 0; sample < samples; ++sample) one_sample(sample, sample / batch_samples_);
      round(2 * samples).run(1, part, [](i64) {}, last);
    } else if (call.forward()) {
      round(0).run(tasks, part, [&](i64 task) {
        const i64 end = std::min((task + 1) * grain, samples);
        for (i64 sample = task * grain; sample < end; ++sample) one_sample(sample, 0);
      }, last);
    } else {
      round(0).run(spans, part, [&](i64 span) {
        for (i64 sample = first_sample(span); sample < end_sample(span); ++sample) one_sample(sample, span);
      }, last);
    }
  }

  // Run `chunk` for all chunks of a sample, and then `last`, in the threads that process the sample.
  template <class Chunk, class Last>
  void each_chunk(i64 sample, int part, Chunk chunk, Last last) const {
    if (!whole_samples_) return round(2 * sample).run(chunks, part, chunk, last);
    for (i64 i = 0; i < chunks; ++i) chunk(i);
    last();
  }

  // Run `chunk` for all of them from the last, of each thread's part: it is still in a cache if
  // `each_chunk` ran before.
  template <class Chunk>
  void each_chunk_again(i64 sample, int part, Chunk chunk) const {
    if (!whole_samples_) return round(2 * sample + 1).run(chunks, part, chunk, [] {}, true);
    for (i64 i = chunks - 1; i >= 0; --i) chunk(i);
  }

  // The buffers of one thread: tables, floats; sums of each channel, (2, channels); pairs of numbers
  // of each group, (groups, 2), twice.
  float* tables(int part) const { return tables_.of(part); }
  double* channel_sums(int part) const { return channel_sums_.of(part); }
  double* thread_pairs(int part) const { return thread_pairs_.of(part); }
  double* thread_statistics(int part) const { return thread_pairs_.of(part) + 2 * groups_; }

  // The buffers of the threads that process a sample: of its chunks, moments, (chunks, groups, 2),
  // counts, (chunks), and sums, (chunks, 2, channels); of the sample, pairs of each group, (groups,
  // 2), and sums, (2, channels).
  double* chunk_moments(int part) const { return chunk_moments_.of(team(part)); }
  double* chunk_counts(int part) const { return chunk_counts_.of(team(part)); }
  float* chunk_sums(int part) const { return chunk_sums_.of(team(part)); }
  double* sample_pairs(int part) const { return sample_pairs_.of(team(part)); }
  double* sample_sums(int part) const { return sample_sums_.of(team(part)); }

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
    if (batch_samples_ == 1) {
      call.dbias[sample * channels + channel] = static_cast<float>(total);
      call.dscale[sample * channels + channel] = static_cast<float>(weighted);
      return;
    }
    double* sums = span_sums_ + span * 2 * channels + channel;
    const bool first = sample == first_sample(span);
    sums[0] = total + (first ? 0 : sums[0]);
    sums[channels] = weighted + (first ? 0 : sums[channels]);
  }

  // Add the spans of each batch, into the gradients.
  void add_spans(const Call& call, i64 channels) const {
    if (call.stages != BACKWARD || batch_samples_ == 1) return;
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
  // As many buffers of the same length as threads or teams use them.
  template <class T>
  struct Buffers {
    T* first = nullptr;
    i64 each = 0;

    T* of(int number) const { return first + number * each; }
  };

  i64 batches() const { return batches_; }
  int team(int part) const { return whole_samples_ ? part : 0; }

  // Whether threads share groups, not samples or rows.
  static bool by_groups(const Shape& shape) { return shape.channels_first && shape.positions > 1; }

  void divide(const Call& call) {
    const Shape& shape = call.shape;
    const i64 channels = shape.channels(), positions = shape.positions, elements = channels * positions;
    const bool backward = !call.forward();
    batches_ = call.batches, channels_ = channels, groups_ = shape.groups;
    batch_samples_ = shape.samples / batches_;
    whole_samples_ = positions == 1 || by_groups(shape) ||
        elements <= (shape.samples >= FEW_SAMPLES ? SMALL_SAMPLE : SMALL_SAMPLE_OF_FEW);
    i64 in_batch = std::max(quotient_up(MIN_SPANS, batches_), batch_samples_ * positions / SPAN_POSITIONS);
    in_batch = whole_samples_ ? std::min(in_batch, batch_samples_) : 1;
    span_samples_ = quotient_up(batch_samples_, in_batch);
    spans = batches_ * quotient_up(batch_samples_, span_samples_);
    if (by_groups(shape)) {
      grain = std::max<i64>(1, GRAIN / (shape.stretch() * (backward ? span_samples_ : 1)));
      tasks = quotient_up((backward ? spans : shape.samples) * shape.groups, grain);
      return;
    }
    grain = std::max<i64>(1, GRAIN / elements);
    tasks = quotient_up(shape.samples, grain);
    // With a mask, rows are processed one by one.
    const i64 band_rows =
        call.mask ? 1 : std::max(quotient_up(LONGEST_VECTOR, channels), std::min(BAND / channels, positions / 16));
    width = band_rows * channels;
    table_length = quotient_up(width, LONGEST_VECTOR) * LONGEST_VECTOR + LONGEST_VECTOR;
    const i64 least = MIN_CHUNK_ROWS * 4 / item_bytes(call.x_dtype);
    const i64 rows = std::max(least, CHUNK / channels) / band_rows * band_rows;
    chunk_rows = std::min(std::max(rows, band_rows), quotient_up(positions, band_rows) * band_rows);
    chunks = quotient_up(positions, chunk_rows);
  }

  template <class T>
  T* take(std::byte* base, i64 count) {
    T* found = base ? reinterpret_cast<T*>(base + size_) : nullptr;
    size_ += quotient_up(count * static_cast<i64>(sizeof(T)), LINE) * LINE;
    return found;
  }

  // Whole lines for each thread, so that no two write to the same.
  template <class T>
  void take(std::byte* base, Buffers<T>& buffers, i64 number, i64 length) {
    buffers.each = quotient_up(length, LINE / static_cast<i64>(sizeof(T))) * (LINE / static_cast<i64>(sizeof(T)));
    buffers.first = take<T>(base, number * buffers.each);
  }

  void place(const Call& call, std::byte* base) {
    const bool backward = !call.forward();
    size_ = 0;
    counters_ = (whole_samples_ ? 1 : 2 * call.shape.samples + 1) * Round::counters_of(parts_);
    first_counter_ = take<Counter>(base, counters_);
    span_sums_ = take<double>(base, call.stages == BACKWARD && batch_samples_ > 1 ? spans * 2 * channels_ : 0);
    if (by_groups(call.shape)) return;
    take(base, tables_, parts_, (backward ? 6 : 3) * table_length);
    if (call.shape.positions == 1) return;
    take(base, channel_sums_, parts_, 2 * channels_);
    take(base, thread_pairs_, parts_, 4 * groups_);
    const int teams = whole_samples_ ? parts_ : 1;
    take(base, sample_pairs_, teams, 2 * groups_);
    take(base, sample_sums_, teams, backward ? 2 * channels_ : 0);
    take(base, chunk_sums_, teams, backward ? chunks * 2 * channels_ : 0);
    take(base, chunk_moments_, teams, backward ? 0 : chunks * 2 * groups_);
    take(base, chunk_counts_, teams, backward ? 0 : chunks);
  }

  struct Delete {
    void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t(LINE)); }
  };

  int parts_;
  bool whole_samples_ = false;
  i64 channels_ = 0, groups_ = 0, batches_ = 1, batch_samples_ = 0, span_samples_ = 1, counters_ = 0;
  std::size_t size_ = 0;
  std::unique_ptr<std::byte, Delete> memory_;
  Counter* first_counter_ = nullptr;
  double* span_sums_ = nullptr;
  Buffers<float> tables_, chunk_sums_;
  Buffers<double> channel_sums_, thread_pairs_, sample_pairs_, sample_sums_, chunk_moments_, chunk_counts_;
};

}  // namespace groupnorm
