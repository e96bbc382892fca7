"""Group normalization for CPUs, channels last, compiled by numba: forward and backward.

Arrays are flat, of shape (N, P, groups * size) with P positions. Each channel is measured
separately, one chunk of rows at a time; chunks, and then the channels of a group, are merged in
float64 by the formula of Chan, Golub and LeVeque; then all rows are normalized.

A chunk is read once for its statistics: its channels are measured about the means of its first
rows. Only if one of these turns out to be far from the chunk's own mean (`centre_is_poor`) is the
chunk measured again. So no data can mislead a pivot, and the order of operations depends on the
shape alone.

Rows of few channels are short, so loops run over a *band* of several rows at once, together with
tables that repeat each per-channel value for every row; the length of both is the `width`. Loops
are separate functions, which take whole arrays and an offset; see ``channels_first.py``.

Threads share the chunks of one sample after the other, so that a sample stays in a cache; small
samples are processed by one thread each.
"""

import numpy as np

from groupnorm.backends.kernels.cpu.compiled.bands import (
    add,
    add_moments,
    add_moments_of_four,
    add_products,
    add_products_of_four,
    add_products_of_invalid,
    add_rows,
    apply,
    apply_to_invalid,
    apply_to_two,
    input_gradient,
    input_gradient_of_invalid,
    input_gradient_of_two,
    repeat_rows,
)
from groupnorm.backends.kernels.cpu.compiled.elements import jit, load
from groupnorm.backends.kernels.cpu.compiled.moments import (
    MAX_VARIANCE,
    MIN_VARIANCE,
    centre_is_poor,
    finite_float32,
    in_float64,
    inverse_deviation,
    mask_begins,
    samples_of,
    sum_spans,
)
from groupnorm.backends.kernels.cpu.compiled.work_sharing import (
    claim_part,
    claim_task,
    finish,
    wait,
)

__all__ = ["channels_last_backward", "channels_last_forward"]

F, U = np.float32, np.uint64

# The least rows, and bands, of a chunk that its first centre is the mean of.
SAMPLE_ROWS, SAMPLE_BANDS = 8, 4
# Sums are added in float32 over this many sets of four bands, or twice as many bands, and then in
# float64. With a mask a band is one row, and there are up to 65536 of them in a chunk.
RUN = 32


# Statistics ---------------------------------------------------------------------------------------


@jit()
def _is_valid(mask, mask_at, row):
    return mask is None or mask[mask_at + row] != 0


@jit(inline=False)
def _choose(mask, mask_at, first, rows, channels, width, band_starts):
    """List where the valid bands begin in the chunk (with a mask, a band is one row).

    The last entry is where the remainder, less than a band, begins.
    """
    bands, step = 0, width // channels
    for row in range(0, rows - step + 1, step):
        if _is_valid(mask, mask_at, first + row):
            band_starts[bands] = row * channels
            bands += 1
    band_starts[bands] = rows // step * step * channels
    return bands


@jit(inline=False)
def _sample_mean(x, begin, band_starts, bands, left, channels, base, total, folded):
    """Set base to the mean of the first bands of a chunk, or of its remainder if it has none."""
    n = base.size if bands > 0 else left
    for c in range(channels):
        base[c] = load(x, U(begin + band_starts[0] + c))
    repeat_rows(base, channels)
    total[:] = 0
    taken = min(max(bands, 1), max(SAMPLE_BANDS, SAMPLE_ROWS * channels // base.size))
    for i in range(taken):
        add(x, begin + band_starts[i], n, base, total)
    folded[:] = 0.0
    add_rows(total, channels, folded)
    for c in range(channels):
        base[c] += F(folded[c] / (taken * n // channels))
    repeat_rows(base, channels)


@jit(inline=False)
def _add_both(total, squares, channels, sums, square_sums):
    add_rows(total, channels, sums)
    add_rows(squares, channels, square_sums)


@jit(inline=False)
def _take_moments(
    x, begin, band_starts, bands, left, channels, base, total, squares, sums, square_sums
):  # fmt: skip
    total[:] = 0
    squares[:] = 0
    sums[:] = 0.0
    square_sums[:] = 0.0
    q = bands // 4
    for first in range(0, q, RUN):
        if first > 0:
            _add_both(total, squares, channels, sums, square_sums)
        for i in range(first, min(first + RUN, q)):
            add_moments_of_four(
                x, begin + band_starts[i], begin + band_starts[i + q],
                begin + band_starts[i + 2 * q], begin + band_starts[i + 3 * q], base, total,
                squares,
            )  # fmt: skip
    for i in range(4 * q, bands):
        add_moments(x, begin + band_starts[i], base.size, base, total, squares)
    add_moments(x, begin + band_starts[bands], left, base, total, squares)
    _add_both(total, squares, channels, sums, square_sums)


@jit(inline=False)
def _measure(
    x, mask, mask_at, begin, first, rows, channels, base, total, squares, band_starts, mean, m2
):  # fmt: skip
    """Measure the channels of a chunk; return the count. `begin` is an element, `first` a row."""
    width = base.size
    bands = _choose(mask, mask_at, first, rows, channels, width, band_starts)
    left = rows * channels % width  # less than a band; 0 if bands are rows
    n = bands * (width // channels) + left // channels
    if n == 0:
        mean[:] = 0.0
        m2[:] = 0.0
        return 0.0
    # The sums use the memory of mean and m2.
    _sample_mean(x, begin, band_starts, bands, left, channels, base, total, mean)
    for attempt in range(2):
        _take_moments(x, begin, band_starts, bands, left, channels, base, total, squares, mean, m2)
        off, inv_count = False, 1.0 / n
        for c in range(channels):
            off |= centre_is_poor(mean[c], mean[c] * inv_count, m2[c])
        if not off or attempt == 1:
            break
        for c in range(channels):
            base[c] += F(mean[c] / n)
        repeat_rows(base, channels)
    for c in range(channels):
        shift = mean[c] / n
        rest = m2[c] - mean[c] * shift
        mean[c] = np.float64(base[c]) + shift
        m2[c] = rest if not rest < 0 else 0.0  # keeps NaN
    return float(n)


@jit(inline=False)
def _merge_chunk(n, count, means, m2s, at, mean, m2):
    """Merge the channels of one chunk into those of all chunks before it."""
    at = U(at)
    weight, product = n / (count + n), count * (n / (count + n))
    for c in range(mean.size):
        delta = means[at + U(c)] - mean[c]
        mean[c] += delta * weight
        m2[c] += m2s[at + U(c)] + delta * delta * product


@jit(inline=False)
def _merge(
    x, mask, mask_at, sample, row, groups, size, positions, epsilon, counts, means, m2s, mean,
    rstd, inv_count,
):  # fmt: skip
    """Merge the chunks of a sample into the statistics of its groups, of the row `row`."""
    channels = groups * size
    m, v = means[:channels], m2s[:channels]
    count = counts[0]
    for chunk in range(1, counts.size):
        if counts[chunk] > 0:
            _merge_chunk(counts[chunk], count, means, m2s, chunk * channels, m, v)
            count += counts[chunk]
    for group in range(groups):
        a, b = group * size, (group + 1) * size
        shift = 0.0
        for c in range(a, b):
            shift += m[c] - m[a]
        group_mean = m[a] + shift / size
        group_m2 = 0.0
        for c in range(a, b):
            group_m2 += v[c] + count * (m[c] - group_mean) * (m[c] - group_mean)
        variance = 1.0
        if count > 0:
            variance = group_m2 / (count * size)
            if not MIN_VARIANCE <= variance <= MAX_VARIANCE:
                begin = sample * positions * channels + a
                _, group_mean, variance = in_float64(
                    x, begin, positions, channels, size, mask, mask_at, True
                )
        k = row * groups + group
        mean[k], rstd[k] = group_mean, inverse_deviation(variance, epsilon)
        inv_count[k] = 1.0 / (count * size) if count > 0 else 0.0


@jit(inline=False)
def _set_tables(row, groups, size, scale, bias, mean, rstd, centre, factor, term):
    """Fill the tables that normalize a sample."""
    for group in range(groups):
        m, r = mean[row * groups + group], rstd[row * groups + group]
        rounded = F(m)
        rest = m - np.float64(rounded)
        for c in range(group * size, (group + 1) * size):
            centre[c] = rounded
            factor[c] = finite_float32(r * scale[c])
            term[c] = F(bias[c] - rest * r * scale[c])
    repeat_rows(centre, groups * size)
    repeat_rows(factor, groups * size)
    repeat_rows(term, groups * size)


# Kernels ------------------------------------------------------------------------------------------


@jit(inline=False)
def _apply_chunk(
    x, y, mask, mask_at, begin, first, rows, channels, centre, factor, term, activation
):  # fmt: skip
    width, at, end = centre.size, begin, begin + rows * channels
    if mask is None:
        half = rows * channels // (2 * width) * width
        for a in range(begin, begin + half, width):
            apply_to_two(x, y, a, a + half, centre, factor, term, activation)
        at += 2 * half
    for a in range(at, end, width):
        n = min(width, end - a)
        if _is_valid(mask, mask_at, first + (a - begin) // channels):
            apply(x, y, a, n, centre, factor, term, activation)
        else:
            apply_to_invalid(x, y, a, n, centre, factor, term, activation)


# The first two counters are of the threads' parts and of finished chunks. Then each sample has the
# counters of chunks claimed for measuring, one per part; one of measured chunks, plus 1 once they
# are merged; and those of chunks claimed for normalizing, one per part. If threads process whole
# samples, the first of these count the claimed samples.


@jit()
def _is_last(counters, counter, task, chunks, whole):
    """Whether all chunks of a sample have been measured, so that they can be merged."""
    return task == chunks - 1 if whole else finish(counters, counter, 1) == chunks


@jit()
def _slice(array, number, length):
    """Return one of the equal parts of an array."""
    return array[number * length : (number + 1) * length]


@jit(inline=False)
def channels_last_forward(
    x, y, scale, bias, mask, groups, size, positions, samples, span, rows, width, whole, epsilon,
    activation, mean, rstd, inv_count, chunk_results, band_starts, tables, parts, counters,
):  # fmt: skip
    """Measure and normalize all samples; a `span` of them has more than one only if `whole`.

    The statistics have one row of groups per sample, or one per thread that it uses again.

    Every thread has its own tables, (parts, 3, width), and band_starts, (parts, bands of a chunk +
    1). chunk_results, (1, chunks * (1 + 2 * channels)), is shared by all threads, one sample at a
    time; if each thread processes `whole` samples, every thread has its own, (parts, ...).
    """
    channels = groups * size
    chunks = (positions + rows - 1) // rows
    own_part = claim_part(counters, 0, parts)
    # Tables of the sums first, then of the factors that are applied.
    one, two, three = (
        _slice(tables, 3 * own_part, width), _slice(tables, 3 * own_part + 1, width),
        _slice(tables, 3 * own_part + 2, width),
    )  # fmt: skip
    band_starts = _slice(band_starts, own_part, band_starts.size // parts)
    buffer = _slice(chunk_results, own_part if whole else 0, chunks * (1 + 2 * channels))
    counts, moments = buffer[:chunks], buffer[chunks:]
    means, m2s = _slice(moments, 0, chunks * channels), _slice(moments, 1, chunks * channels)
    keep, spans = mean.size == samples * groups, (samples + span - 1) // span
    for turn in range(spans):
        number = claim_task(counters, 2, parts, spans, own_part) if whole else turn
        if number < 0:
            break
        counter = 2 + turn * (2 * parts + 1)
        first_sample, end_sample = samples_of(number, span, samples, 1)
        for sample in range(first_sample, end_sample):
            row = sample if keep else own_part
            mask_at, begin = mask_begins(mask, sample, positions), sample * positions * channels
            for task in range(chunks):
                chunk = task if whole else claim_task(counters, counter, parts, chunks, own_part)
                if chunk < 0:
                    break
                first = chunk * rows
                counts[chunk] = _measure(
                    x, mask, mask_at, begin + first * channels, first,
                    min(rows, positions - first), channels, one, two, three, band_starts,
                    _slice(means, chunk, channels), _slice(m2s, chunk, channels),
                )  # fmt: skip
                if _is_last(counters, counter + parts, task, chunks, whole):
                    _merge(
                        x, mask, mask_at, sample, row, groups, size, positions, epsilon, counts,
                        means, m2s, mean, rstd, inv_count,
                    )  # fmt: skip
                    if not whole:
                        finish(counters, counter + parts, 1)
            if not whole:
                wait(counters, counter + parts, chunks + 1)
            ready = False
            for task in range(chunks):
                chunk = (
                    task
                    if whole
                    else claim_task(counters, counter + parts + 1, parts, chunks, own_part)
                )
                if chunk < 0:
                    break
                if not ready:  # only now: a late thread may find the shared buffers freed
                    _set_tables(row, groups, size, scale, bias, mean, rstd, one, two, three)
                    ready = True
                first = chunk * rows
                _apply_chunk(
                    x, y, mask, mask_at, begin + first * channels, first,
                    min(rows, positions - first), channels, one, two, three, activation,
                )  # fmt: skip
                if not whole:
                    finish(counters, 1, 1)
        if whole:
            finish(counters, 1, (end_sample - first_sample) * chunks)
    wait(counters, 1, samples * chunks)


@jit(inline=False)
def _sum_products(
    x, dy, mask, mask_at, begin, first, rows, channels, centre, factor, term, activation,
    total, weighted, sums, weighted_sums,
):  # fmt: skip
    """Sum g and g * (x - centre) over each channel of a chunk."""
    width = centre.size
    step, at, end = width // channels, begin, begin + rows * channels
    total[:] = 0
    weighted[:] = 0
    sums[:] = 0.0
    weighted_sums[:] = 0.0
    if mask is None:
        quarter = rows // (4 * step) * width
        for a in range(begin, begin + quarter, width):
            add_products_of_four(
                x, dy, a, a + quarter, a + 2 * quarter, a + 3 * quarter, centre, factor, term,
                activation, total, weighted,
            )  # fmt: skip
        at += 4 * quarter
    run_width = 2 * RUN * width
    for run in range(at, end, run_width):
        for a in range(run, min(run + run_width, end), width):
            n = min(width, end - a)
            if _is_valid(mask, mask_at, first + (a - begin) // channels):
                add_products(x, dy, a, n, centre, factor, term, activation, total, weighted)
            else:
                add_products_of_invalid(
                    x, dy, a, n, centre, factor, term, activation, total, weighted
                )
        if run + run_width < end:
            _add_both(total, weighted, channels, sums, weighted_sums)
    _add_both(total, weighted, channels, sums, weighted_sums)


@jit(inline=False)
def _add_sample(sum_dy, sum_dy_xhat, is_first, span_dy, span_dy_xhat):
    """Add the sums of a sample to those of its span."""
    for c in range(sum_dy.size):
        span_dy[c] = sum_dy[c] + (0.0 if is_first else span_dy[c])
        span_dy_xhat[c] = sum_dy_xhat[c] + (0.0 if is_first else span_dy_xhat[c])


@jit(inline=False)
def _merge_backward(
    scale, sample, groups, size, chunks, mean, rstd, inv_count, sums, weighted_sums, sum_dy,
    sum_dy_xhat, group_means,
):  # fmt: skip
    """Merge the chunks of a sample into its sums, and these into means over each group."""
    channels = groups * size
    sum_dy[:] = 0.0
    sum_dy_xhat[:] = 0.0
    for chunk in range(chunks):
        at = U(chunk * channels)
        for c in range(channels):
            sum_dy[c] += sums[at + U(c)]
            sum_dy_xhat[c] += weighted_sums[at + U(c)]
    for group in range(groups):
        k = sample * groups + group
        rest = mean[k] - np.float64(F(mean[k]))
        p, q = 0.0, 0.0
        for c in range(group * size, (group + 1) * size):
            sum_dy_xhat[c] = (sum_dy_xhat[c] - rest * sum_dy[c]) * rstd[k]
            p += scale[c] * sum_dy[c] * inv_count[k]
            q += scale[c] * sum_dy_xhat[c] * inv_count[k]
        group_means[2 * group], group_means[2 * group + 1] = p, q


@jit(inline=False)
def _set_gradient_tables(sample, groups, size, mean, rstd, group_means, rstds, slope, offset):
    """Fill the tables that compute (p + xhat * q) * rstd for dx.

    There xhat is (x - centre - rest) * rstd.
    """
    for group in range(groups):
        m, r = mean[sample * groups + group], rstd[sample * groups + group]
        rest, p, q = m - np.float64(F(m)), group_means[2 * group], group_means[2 * group + 1]
        for c in range(group * size, (group + 1) * size):
            rstds[c] = finite_float32(r)
            slope[c] = finite_float32(r * q)
            offset[c] = finite_float32(r * (p - rest * r * q))
    repeat_rows(rstds, groups * size)
    repeat_rows(slope, groups * size)
    repeat_rows(offset, groups * size)


@jit(inline=False)
def _write_gradient_chunk(
    x, dy, dx, mask, mask_at, begin, first, rows, channels, centre, factor, term, activation,
    rstd, slope, offset,
):  # fmt: skip
    width, at, end = centre.size, begin, begin + rows * channels
    if mask is None:
        half = rows * channels // (2 * width) * width
        for a in range(begin, begin + half, width):
            input_gradient_of_two(
                x, dy, dx, a, a + half, centre, factor, term, rstd, slope, offset, activation
            )
        at += 2 * half
    for a in range(at, end, width):
        n = min(width, end - a)
        if _is_valid(mask, mask_at, first + (a - begin) // channels):
            input_gradient(x, dy, dx, a, n, centre, factor, term, rstd, slope, offset, activation)
        else:
            input_gradient_of_invalid(x, dy, dx, a, n, centre, factor, term, activation)


@jit(inline=False)
def channels_last_backward(
    x, dx, scale, bias, mask, groups, size, positions, samples, span, rows, width, whole,
    activation, mean, rstd, inv_count, dy, sums, batches, dscale, dbias, chunk_results,
    sample_results, tables, parts, counters,
):  # fmt: skip
    """Compute dx, dscale and dbias.

    sums (2, spans, channels) receives the sums of dy and of dy * xhat over the positions of a span
    of samples, in float64; dscale and dbias (batches, channels) receive their sums over the spans
    of each batch. Every thread has its own tables, (parts, 6, width). chunk_results, (1, 2 * chunks
    * channels), is shared or one per thread, as in `channels_last_forward`. sample_results is (N,
    2 * groups), the means over each group; if each thread processes `whole` samples, it has its
    own, followed by the sums of the sample, (parts, 2 * groups + 2 * channels).
    """
    channels = groups * size
    chunks = (positions + rows - 1) // rows
    own_part = claim_part(counters, 0, parts)
    own = _slice(tables, own_part, 6 * width)
    centre, factor, term = _slice(own, 0, width), _slice(own, 1, width), _slice(own, 2, width)
    # Tables of the sums first, then of the factors that are applied.
    one, two, three = _slice(own, 3, width), _slice(own, 4, width), _slice(own, 5, width)
    buffer = _slice(chunk_results, own_part if whole else 0, 2 * chunks * channels)
    products, weighted = _slice(buffer, 0, chunks * channels), _slice(buffer, 1, chunks * channels)
    sample_size = 2 * groups + 2 * channels if whole else 2 * groups
    spans = sums.size // (2 * channels)
    for turn in range(spans):
        number = claim_task(counters, 2, parts, spans, own_part) if whole else turn
        if number < 0:
            break
        counter = 2 + turn * (2 * parts + 1)
        span_dy = _slice(sums, number, channels)
        span_dy_xhat = _slice(sums, spans + number, channels)
        first_sample, end_sample = samples_of(number, span, samples, batches)
        for sample in range(first_sample, end_sample):
            mask_at, begin = mask_begins(mask, sample, positions), sample * positions * channels
            results = _slice(sample_results, own_part if whole else sample, sample_size)
            group_means = results[: 2 * groups]
            sum_dy, sum_dy_xhat = span_dy, span_dy_xhat
            if whole:
                sum_dy = results[2 * groups : 2 * groups + channels]
                sum_dy_xhat = results[2 * groups + channels :]
            ready = False
            for task in range(chunks):
                chunk = task if whole else claim_task(counters, counter, parts, chunks, own_part)
                if chunk < 0:
                    break
                if not ready:
                    _set_tables(sample, groups, size, scale, bias, mean, rstd, centre, factor, term)
                    ready = True
                first = chunk * rows
                _sum_products(
                    x, dy, mask, mask_at, begin + first * channels, first,
                    min(rows, positions - first), channels, centre, factor, term, activation, one,
                    two, _slice(products, chunk, channels), _slice(weighted, chunk, channels),
                )  # fmt: skip
                if _is_last(counters, counter + parts, task, chunks, whole):
                    _merge_backward(
                        scale, sample, groups, size, chunks, mean, rstd, inv_count, products,
                        weighted, sum_dy, sum_dy_xhat, group_means,
                    )  # fmt: skip
                    if not whole:
                        finish(counters, counter + parts, 1)
            if not whole:
                wait(counters, counter + parts, chunks + 1)
            gradient_ready = False
            for task in range(chunks):
                chunk = (
                    task
                    if whole
                    else claim_task(counters, counter + parts + 1, parts, chunks, own_part)
                )
                if chunk < 0:
                    break
                if not ready:
                    _set_tables(sample, groups, size, scale, bias, mean, rstd, centre, factor, term)
                    ready = True
                if not gradient_ready:
                    _set_gradient_tables(
                        sample, groups, size, mean, rstd, group_means, one, two, three
                    )
                    gradient_ready = True
                first = chunk * rows
                _write_gradient_chunk(
                    x, dy, dx, mask, mask_at, begin + first * channels, first,
                    min(rows, positions - first), channels, centre, factor, term, activation,
                    one, two, three,
                )  # fmt: skip
                if not whole and finish(counters, 1, 1) == samples * chunks:
                    sum_spans(sums, batches, channels, dscale, dbias)
                    finish(counters, 1, 1)
            if whole:
                _add_sample(sum_dy, sum_dy_xhat, sample == first_sample, span_dy, span_dy_xhat)
        if whole:
            done = (end_sample - first_sample) * chunks
            if finish(counters, 1, done) == samples * chunks:
                sum_spans(sums, batches, channels, dscale, dbias)
                finish(counters, 1, 1)
    wait(counters, 1, samples * chunks + 1)
