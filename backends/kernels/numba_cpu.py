"""Group normalization for CPUs in numba: forward and backward, channels first and channels last.

Arrays come flat, in memory order: channels first as (N, groups, size, P), channels last as
(N, P, groups * size), with P positions. Each function does a range of its tasks, so that several
threads can share them, and every number depends on the shape alone: blocks and the order in which
they are merged are fixed.

The data is read from memory once for its statistics. Each block of it, which stays in the cache,
is measured around its own mean; blocks are merged in float64 by the formula of Chan, Golub and
LeVeque. So there is no pivot that data could mislead, and no second reading.

Rows are float32. `mean`, `rstd` and `share` (1 / count) of each group are kept in float64; what is
applied to the elements is the pair (mean rounded to float32, the rest of it).
"""

import math

import numpy as np

from groupnorm.backends.kernels.numba_rows import (
    BLOCK,
    activate,
    add_moments_row,
    add_moments_rows,
    add_products_row,
    add_row,
    add_rows,
    affine,
    affine_rows,
    cotangent,
    jit,
    load,
    masked_moments,
    masked_sum,
    moments,
    products,
    pull_back,
    pull_back_masked,
    pull_back_rows,
    store,
    substitute,
    substitute_row,
    sum_from,
    target,
    zero_unless_counted,
    zero_unless_finite,
)

__all__ = [
    "BLOCK",
    "band_rows",
    "chunk_rows",
    "first_backward",
    "first_forward",
    "last_apply",
    "last_backward_apply",
    "last_backward_merge",
    "last_backward_sums",
    "last_measure",
    "last_merge",
]

# Outside of these the square of a deviation may leave float32's range.
LEAST, MOST = 1e-30, 1e30
# Elements of a chunk of rows, channels last: it is read twice, the second time from the cache.
CHUNK = 32768
# Elements of a band of rows: enough to forget what starting a loop costs.
BAND = 1024


def band_rows(channels):
    """Return how many rows loops run over at once."""
    return max(1, BAND // channels)


def chunk_rows(channels):
    """Return how many rows are measured together, some bands of them: by the shape alone."""
    band = band_rows(channels)
    return max(16, -(-CHUNK // (channels * band))) * band


@jit()
def _merged(count, mean, m2, n, centre, total, squares):
    """Merge a block into count, mean and M2: n elements, and their moments about a centre."""
    shift = total / n
    block_m2 = squares - total * shift
    if block_m2 < 0:  # this way round NaN stays NaN
        block_m2 = 0.0
    delta = (centre + shift) - mean
    weight = n / (count + n)
    return count + n, mean + delta * weight, m2 + block_m2 + delta * delta * (count * weight)


@jit()
def _rstd(deviation, epsilon):
    """1 / sqrt(deviation**2 + epsilon), without the square."""
    root = math.hypot(deviation, math.sqrt(epsilon))
    return 1.0 / root if root != 0 else 1.0  # a constant, and no epsilon: any finite number


@jit()
def _bounded(value, row):
    """Keep a factor finite in float32: inf * 0 would make a NaN of a constant."""
    if abs(value) > 3e38:
        return row.dtype.type(math.copysign(3e38, value))
    return row.dtype.type(value)


# Channels first -----------------------------------------------------------------------------------


@jit()
def _measure_first(x, start, stop, float16, buffer):
    """Return count, mean and standard deviation of a contiguous stretch."""
    count, mean, m2 = 0.0, 0.0, 0.0
    for at in range(start, stop, BLOCK):
        row = load(x, at, min(at + BLOCK, stop), float16, buffer)
        centre = row[0] + sum_from(row, row[0]) / row.dtype.type(row.size)
        total, squares = moments(row, centre)
        count, mean, m2 = _merged(
            count,
            mean,
            m2,
            float(row.size),
            np.float64(centre),
            np.float64(total),
            np.float64(squares),
        )
    if LEAST <= m2 / count <= MOST:
        return count, mean, math.sqrt(m2 / count)
    return _measure_first_wide(x, start, stop, float16, buffer)


@jit()
def _measure_first_wide(x, start, stop, float16, buffer):
    """As `_measure_first`, in float64 and scaled: for squares that leave float32's range."""
    count = float(stop - start)
    total, largest, squares, rest = 0.0, 0.0, 0.0, 0.0
    base = np.float64(load(x, start, start + 1, float16, buffer)[0])
    for at in range(start, stop, BLOCK):
        row = load(x, at, min(at + BLOCK, stop), float16, buffer)
        for i in range(row.size):
            total += np.float64(row[i]) - base
    mean = base + total / count
    for at in range(start, stop, BLOCK):
        row = load(x, at, min(at + BLOCK, stop), float16, buffer)
        for i in range(row.size):
            largest = max(largest, abs(np.float64(row[i]) - mean))
    if largest == 0 or not largest < math.inf or mean != mean:
        return count, mean, largest * (mean - mean + 1.0)
    for at in range(start, stop, BLOCK):
        row = load(x, at, min(at + BLOCK, stop), float16, buffer)
        for i in range(row.size):
            d = (np.float64(row[i]) - mean) / largest
            rest += d
            squares += d * d
    shift = rest / count
    return (
        count,
        mean + shift * largest,
        largest * math.sqrt(max(squares / count - shift * shift, 0.0)),
    )


@jit()
def _measure_first_masked(x, start, mask, size, positions, float16, buffer):
    """As `_measure_first`, of the positions whose mask is not 0, of `size` channels."""
    count, mean, m2 = 0.0, 0.0, 0.0
    for channel in range(size):
        for at in range(0, positions, BLOCK):
            stop = min(at + BLOCK, positions)
            valid = mask[at:stop]
            first = _first_valid(valid)
            if first < 0:
                continue
            begin = start + channel * positions
            row = load(x, begin + at, begin + stop, float16, buffer)
            total, n = masked_sum(row, valid, row[first])
            centre = row[first] + total / row.dtype.type(n)
            total, squares = masked_moments(row, valid, centre)
            count, mean, m2 = _merged(
                count,
                mean,
                m2,
                float(n),
                np.float64(centre),
                np.float64(total),
                np.float64(squares),
            )
    if count == 0:
        return 0.0, 0.0, 1.0
    if LEAST <= m2 / count <= MOST:
        return count, mean, math.sqrt(m2 / count)
    return (
        count,
        mean,
        _deviation_first_masked(x, start, mask, size, positions, float16, buffer, mean, count),
    )


@jit()
def _deviation_first_masked(x, start, mask, size, positions, float16, buffer, mean, count):
    largest, squares = 0.0, 0.0
    for scaled in range(2):
        if scaled and (largest == 0 or not largest < math.inf):
            return largest
        for channel in range(size):
            for at in range(positions):
                if mask[at]:
                    i = start + channel * positions + at
                    d = np.float64(load(x, i, i + 1, float16, buffer)[0]) - mean
                    if scaled:
                        squares += (d / largest) * (d / largest)
                    elif d != d:
                        return d
                    else:
                        largest = max(largest, abs(d))
    return largest * math.sqrt(squares / count)


@jit()
def _first_valid(mask):
    for i in range(mask.size):
        if mask[i]:
            return i
    return -1


@jit()
def first_forward(
    x, y, scale, bias, mask, groups, size, positions, epsilon,
    x_float16, y_float16, activation, mean, rstd, share, buffer, y_buffer, start, stop,
):  # fmt: skip
    """Measure and normalize the groups numbered start ... stop of all samples.

    A group is applied right after it was measured, while the cache still has it.
    """
    stretch = size * positions
    masked = mask.shape[0] > 0
    for task in range(start, stop):
        sample, group = task // groups, task % groups
        begin = task * stretch
        valid = mask[sample if mask.shape[0] > 1 else 0] if masked else mask[:0].ravel()
        if masked:
            count, m, deviation = _measure_first_masked(
                x, begin, valid, size, positions, x_float16, buffer
            )
        else:
            count, m, deviation = _measure_first(x, begin, begin + stretch, x_float16, buffer)
        r = _rstd(deviation, epsilon)
        mean[task], rstd[task], share[task] = m, r, 1.0 / count if count > 0 else 0.0
        centre = buffer.dtype.type(m)
        rest = m - np.float64(centre)
        for channel in range(size):
            c = group * size + channel
            factor = _bounded(r * scale[c], buffer)
            term = buffer.dtype.type(bias[c] - rest * r * scale[c])
            row_start = begin + channel * positions
            for at in range(0, positions, BLOCK):
                i, j = row_start + at, row_start + min(at + BLOCK, positions)
                row = load(x, i, j, x_float16, buffer)
                out = target(y, i, j, y_buffer)
                if masked:
                    substitute(row, valid[at : at + j - i], out)
                    affine(out, centre, factor, term, out)
                else:
                    affine(row, centre, factor, term, out)
                activate(out, activation)
                store(out, y, i, j, y_float16)


@jit()
def first_backward(
    x, dy, dx, scale, bias, mask, groups, size, positions,
    x_float16, dy_float16, activation, mean, rstd, share, sum_dy, sum_dy_xhat,
    buffer, dy_buffer, dx_buffer, start, stop,
):  # fmt: skip
    """Pull dy back through the groups numbered start ... stop of all samples.

    sum_dy and sum_dy_xhat get the sums over positions, (N, channels), in float64.
    """
    masked = mask.shape[0] > 0
    clean = np.empty(BLOCK if masked else 0, buffer.dtype)
    slope_buffer = np.empty(BLOCK if activation else 0, buffer.dtype)
    z = np.empty(BLOCK if activation else 0, buffer.dtype)
    for task in range(start, stop):
        sample, group = task // groups, task % groups
        valid = mask[sample if mask.shape[0] > 1 else 0] if masked else mask[:0].ravel()
        m, r = mean[task], rstd[task]
        centre = buffer.dtype.type(m)
        rest = m - np.float64(centre)
        p, q = 0.0, 0.0
        for phase in range(2):
            for channel in range(size):
                c = group * size + channel
                row_start = (task * size + channel) * positions
                factor = _bounded(r * scale[c], buffer)
                term = buffer.dtype.type(bias[c] - rest * r * scale[c])
                total, weighted = 0.0, 0.0
                for at in range(0, positions, BLOCK):
                    i, j = row_start + at, row_start + min(at + BLOCK, positions)
                    given = load(x, i, j, x_float16, buffer)
                    g = load(dy, i, j, dy_float16, dy_buffer)
                    row = given
                    block = valid[at : at + j - i]
                    if masked:
                        row = clean[: j - i]
                        substitute(given, block, row)
                    if activation:
                        affine(row, centre, factor, term, z[: j - i])
                        cotangent(z[: j - i], g, activation, slope_buffer[: j - i])
                        g = slope_buffer[: j - i]
                    if phase == 0:
                        s, w = products(g, row, centre)
                        total += np.float64(s)
                        weighted += np.float64(w)
                        continue
                    out = target(dx, i, j, dx_buffer)
                    if masked:
                        pull_back_masked(
                            row, g, block, centre, buffer.dtype.type(r),
                            buffer.dtype.type(rest * r), factor, buffer.dtype.type(r * q),
                            buffer.dtype.type(r * p), out,
                        )  # fmt: skip
                        zero_unless_counted(given, block, out)
                    else:
                        pull_back(
                            row, g, centre, buffer.dtype.type(r), buffer.dtype.type(rest * r),
                            factor, buffer.dtype.type(r * q), buffer.dtype.type(r * p), out,
                        )  # fmt: skip
                    store(out, dx, i, j, x_float16)
                if phase == 0:
                    k = sample * groups * size + c
                    sum_dy[k] = total
                    sum_dy_xhat[k] = (weighted - rest * total) * r
                    p += scale[c] * sum_dy[k] * share[task]
                    q += scale[c] * sum_dy_xhat[k] * share[task]


# Channels last ------------------------------------------------------------------------------------
#
# Few channels make short rows, so loops run over a `band` of several rows at once, beside vectors
# in which each channel's number is repeated as often; their length is the `width`.


@jit()
def _fold(sums, channels):
    """Add up what the rows of a band have for each channel."""
    for at in range(channels, sums.size, channels):
        for c in range(channels):
            sums[c] += sums[at + c]


@jit()
def _spread(values, channels):
    """Repeat what the first row of a band has."""
    for at in range(channels, values.size, channels):
        values[at : at + channels] = values[:channels]


@jit()
def last_measure(
    x, mask, positions, channels, width, rows, chunks, float16, counts, means, m2s, buffer,
    start, stop,
):  # fmt: skip
    """Measure the chunks numbered start ... stop of all samples, each channel on its own.

    counts (tasks,), means and m2s (tasks, channels) are in float64.
    """
    masked = mask.shape[0] > 0  # and then a band is one row
    base = np.empty(width, buffer.dtype)
    total = np.empty(width, buffer.dtype)
    squares = np.empty(width, buffer.dtype)
    chosen = np.empty(rows * channels // width + 1, np.int64)
    for task in range(start, stop):
        sample, chunk = task // chunks, task % chunks
        first = chunk * rows
        size = (min(first + rows, positions) - first) * channels
        begin = (sample * positions + first) * channels
        flat = load(x, begin, begin + size, float16, buffer)
        bands = 0
        for at in range(0, size - width + 1, width):
            if not masked or mask[sample if mask.shape[0] > 1 else 0, first + at // channels]:
                chosen[bands] = at
                bands += 1
        # What is left is less than a band, and so there is nothing where bands are rows.
        left = size - size % width
        n = bands * (width // channels) + (size - left) // channels
        counts[task] = n
        if n == 0:
            means[task, :] = 0.0
            m2s[task, :] = 0.0
            continue
        origin = chosen[0] if bands else left
        base[:channels] = flat[origin : origin + channels]
        _spread(base, channels)
        total[:] = 0
        whole = bands - bands % 4
        for i in range(0, whole, 4):
            a, b, c, d = chosen[i], chosen[i + 1], chosen[i + 2], chosen[i + 3]
            add_rows(
                flat[a : a + width], flat[b : b + width], flat[c : c + width],
                flat[d : d + width], base, total,
            )  # fmt: skip
        for i in range(whole, bands):
            add_row(flat[chosen[i] : chosen[i] + width], base, total)
        add_row(flat[left:size], base, total)
        _fold(total, channels)
        for c in range(channels):
            base[c] += total[c] / buffer.dtype.type(n)
        _spread(base, channels)
        total[:] = 0
        squares[:] = 0
        for i in range(0, whole, 4):
            a, b, c, d = chosen[i], chosen[i + 1], chosen[i + 2], chosen[i + 3]
            add_moments_rows(
                flat[a : a + width], flat[b : b + width], flat[c : c + width],
                flat[d : d + width], base, total, squares,
            )  # fmt: skip
        for i in range(whole, bands):
            add_moments_row(flat[chosen[i] : chosen[i] + width], base, total, squares)
        add_moments_row(flat[left:size], base, total, squares)
        _fold(total, channels)
        _fold(squares, channels)
        for c in range(channels):
            shift = np.float64(total[c]) / n
            means[task, c] = np.float64(base[c]) + shift
            m2s[task, c] = np.float64(squares[c]) - np.float64(total[c]) * shift


@jit()
def _merge_chunk(n, count, means, m2s, m, m2):
    """Merge one chunk's channels into all before it."""
    weight = n / (count + n)
    for c in range(m.size):
        delta = means[c] - m[c]
        m[c] += delta * weight
        own = m2s[c] if not m2s[c] < 0 else 0.0  # NaN stays NaN
        m2[c] += own + delta * delta * (count * weight)


@jit()
def last_merge(
    x, mask, scale, bias, groups, size, positions, chunks, epsilon, float16,
    counts, means, m2s, mean, rstd, share, centre, factor, term, buffer, start, stop,
):  # fmt: skip
    """Merge the chunks of samples start ... stop, and make of them what is applied.

    centre, factor and term (samples, width) are in the rows' dtype.
    """
    channels = groups * size
    m = np.empty(channels)
    m2 = np.empty(channels)
    for sample in range(start, stop):
        count = 0.0
        m[:] = 0.0
        m2[:] = 0.0
        for task in range(sample * chunks, (sample + 1) * chunks):
            if counts[task] > 0:
                _merge_chunk(counts[task], count, means[task], m2s[task], m, m2)
                count += counts[task]
        for group in range(groups):
            a, b = group * size, (group + 1) * size
            shift = 0.0
            for c in range(a, b):
                shift += m[c] - m[a]
            group_mean = m[a] + shift / size
            group_m2 = 0.0
            for c in range(a, b):
                group_m2 += m2[c] + count * (m[c] - group_mean) * (m[c] - group_mean)
            k = sample * groups + group
            deviation = 1.0
            if count > 0:
                variance = group_m2 / (count * size)
                deviation = math.sqrt(variance)
                if not LEAST <= variance <= MOST:
                    deviation = _deviation_last(
                        x, mask, sample, positions, channels, a, b, float16, buffer,
                        group_mean, count * size,
                    )  # fmt: skip
            r = _rstd(deviation, epsilon)
            mean[k], rstd[k] = group_mean, r
            share[k] = 1.0 / (count * size) if count > 0 else 0.0
            rounded = buffer.dtype.type(group_mean)
            rest = group_mean - np.float64(rounded)
            for c in range(a, b):
                centre[sample, c] = rounded
                factor[sample, c] = _bounded(r * scale[c], buffer)
                term[sample, c] = buffer.dtype.type(bias[c] - rest * r * scale[c])
        _spread(centre[sample], channels)
        _spread(factor[sample], channels)
        _spread(term[sample], channels)


@jit()
def _deviation_last(x, mask, sample, positions, channels, a, b, float16, buffer, mean, count):
    """The standard deviation in float64, scaled: for squares that leave the dtype's range."""
    masked = mask.shape[0] > 0
    largest, squares = 0.0, 0.0
    for scaled in range(2):
        if scaled and (largest == 0 or not largest < math.inf):
            return largest
        for i in range(positions):
            if masked and not mask[sample if mask.shape[0] > 1 else 0, i]:
                continue
            begin = (sample * positions + i) * channels
            row = load(x, begin + a, begin + b, float16, buffer)
            for c in range(row.size):
                d = np.float64(row[c]) - mean
                if scaled:
                    squares += (d / largest) * (d / largest)
                elif d != d:
                    return d
                else:
                    largest = max(largest, abs(d))
    return largest * math.sqrt(squares / count)


@jit()
def _band(i, stop, positions, channels, width):
    """Return the sample of row i, and how many elements the band that begins there has."""
    sample = i // positions
    rows = min(width // channels, stop - i, (sample + 1) * positions - i)
    return sample, rows * channels


@jit()
def _apply_band(
    x, y, begin, n, valid, x_float16, y_float16, activation, centre, factor, term, buffer, y_buffer
):  # fmt: skip
    row = load(x, begin, begin + n, x_float16, buffer)
    out = target(y, begin, begin + n, y_buffer)
    if not valid:
        substitute_row(row, out)
        row = out
    affine_rows(row, centre, factor, term, out)
    if activation:
        activate(out, activation)
    store(out, y, begin, begin + n, y_float16)


@jit()
def last_apply(
    x, y, mask, positions, channels, x_float16, y_float16, activation,
    centres, factors, terms, buffer, y_buffer, start, stop,
):  # fmt: skip
    """Normalize the rows numbered start ... stop of all samples."""
    masked = mask.shape[0] > 0
    width = centres.shape[1]
    i = start
    while i < stop:
        sample = i // positions
        centre, factor, term = centres[sample], factors[sample], terms[sample]
        last = min(stop, (sample + 1) * positions) * channels
        begin = i * channels
        while begin + width <= last:
            valid = True
            if masked:
                at = begin // channels - sample * positions
                valid = mask[sample if mask.shape[0] > 1 else 0, at] != 0
            _apply_band(
                x, y, begin, width, valid, x_float16, y_float16, activation,
                centre, factor, term, buffer, y_buffer,
            )  # fmt: skip
            begin += width
        n = last - begin  # less than a band, and so nothing where bands are rows
        _apply_band(
            x, y, begin, n, True, x_float16, y_float16, activation,
            centre[:n], factor[:n], term[:n], buffer, y_buffer,
        )  # fmt: skip
        i = last // channels


@jit()
def _row_and_cotangent(
    x, dy, mask, i, n, positions, channels, x_float16, dy_float16, activation,
    centre, factor, term, buffer, dy_buffer, clean, z, slope,
):  # fmt: skip
    """Return a band of x as it was normalized, and the cotangent of what activation was given."""
    sample, begin = i // positions, i * channels
    row = load(x, begin, begin + n, x_float16, buffer)
    g = load(dy, begin, begin + n, dy_float16, dy_buffer)
    if mask.shape[0] > 0 and not mask[sample if mask.shape[0] > 1 else 0, i % positions]:
        substitute_row(row, clean[:n])
        row = clean[:n]
    if activation:
        affine_rows(row, centre[sample, :n], factor[sample, :n], term[sample, :n], z[:n])
        cotangent(z[:n], g, activation, slope[:n])
        g = slope[:n]
    return row, g


@jit()
def last_backward_sums(
    x, dy, mask, positions, channels, rows, chunks, x_float16, dy_float16, activation,
    centre, factor, term, sums, weighted_sums, buffer, dy_buffer, start, stop,
):  # fmt: skip
    """Sum dy and dy * (x - centre) over the rows of the chunks numbered start ... stop.

    sums and weighted_sums (tasks, channels) are in float64.
    """
    width = centre.shape[1]
    total, weighted, clean, z, slope = np.empty((5, width), buffer.dtype)
    for task in range(start, stop):
        sample, chunk = task // chunks, task % chunks
        total[:] = 0
        weighted[:] = 0
        i = sample * positions + chunk * rows
        last = sample * positions + min((chunk + 1) * rows, positions)
        while i < last:
            _, n = _band(i, last, positions, channels, width)
            row, g = _row_and_cotangent(
                x, dy, mask, i, n, positions, channels, x_float16, dy_float16,
                activation, centre, factor, term, buffer, dy_buffer, clean, z, slope,
            )  # fmt: skip
            add_products_row(g, row, centre[sample, :n], total, weighted)
            i += n // channels
        _fold(total, channels)
        _fold(weighted, channels)
        for c in range(channels):
            sums[task, c] = total[c]
            weighted_sums[task, c] = weighted[c]


@jit()
def last_backward_merge(
    scale, groups, size, chunks, mean, rstd, share, sums, weighted_sums, sum_dy, sum_dy_xhat,
    rstds, shift, slope, offset, start, stop,
):  # fmt: skip
    """Merge the chunks of samples start ... stop into what `last_backward_apply` needs."""
    channels = groups * size
    for sample in range(start, stop):
        for c in range(channels):
            sum_dy[sample, c] = 0.0
            sum_dy_xhat[sample, c] = 0.0
        for task in range(sample * chunks, (sample + 1) * chunks):
            for c in range(channels):
                sum_dy[sample, c] += sums[task, c]
                sum_dy_xhat[sample, c] += weighted_sums[task, c]
        for group in range(groups):
            k = sample * groups + group
            r = rstd[k]
            rest = mean[k] - np.float64(rstds.dtype.type(mean[k]))
            p, q = 0.0, 0.0
            for c in range(group * size, (group + 1) * size):
                sum_dy_xhat[sample, c] = (sum_dy_xhat[sample, c] - rest * sum_dy[sample, c]) * r
                p += scale[c] * sum_dy[sample, c] * share[k]
                q += scale[c] * sum_dy_xhat[sample, c] * share[k]
            for c in range(group * size, (group + 1) * size):
                rstds[sample, c] = r
                shift[sample, c] = rest * r
                slope[sample, c] = r * q
                offset[sample, c] = r * p
        _spread(rstds[sample], channels)
        _spread(shift[sample], channels)
        _spread(slope[sample], channels)
        _spread(offset[sample], channels)


@jit()
def last_backward_apply(
    x, dy, dx, mask, positions, channels, x_float16, dy_float16, activation,
    centre, factor, term, rstds, shift, slope, offset,
    buffer, dy_buffer, dx_buffer, start, stop,
):  # fmt: skip
    """Compute dx of the rows numbered start ... stop of all samples."""
    masked = mask.shape[0] > 0
    width = centre.shape[1]
    clean, z, activation_slope = np.empty((3, width), buffer.dtype)
    i = start
    while i < stop:
        sample, n = _band(i, stop, positions, channels, width)
        begin = i * channels
        out = target(dx, begin, begin + n, dx_buffer)
        row, g = _row_and_cotangent(
            x, dy, mask, i, n, positions, channels, x_float16, dy_float16,
            activation, centre, factor, term, buffer, dy_buffer, clean, z, activation_slope,
        )  # fmt: skip
        invalid = masked and not mask[sample if mask.shape[0] > 1 else 0, i % positions]
        pull_back_rows(
            row, g, buffer.dtype.type(0 if invalid else 1), centre[sample, :n], rstds[sample, :n],
            shift[sample, :n], factor[sample, :n], slope[sample, :n], offset[sample, :n], out,
        )  # fmt: skip
        if invalid:
            zero_unless_finite(load(x, begin, begin + n, x_float16, buffer), out)
        store(out, dx, begin, begin + n, x_float16)
        i += n // channels
