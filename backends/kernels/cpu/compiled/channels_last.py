"""Group normalization for CPUs, channels last, compiled by numba: forward and backward.

Arrays come flat, as (N, P, groups * size) with P positions. Each channel is measured on its own, a
chunk of rows at a time; chunks are merged in float64, channels into groups, by the formula of Chan,
Golub and LeVeque, and then all rows are normalized.

A chunk is read once for its statistics: its channels are measured around the means of its first
rows. Only where one of those turns out to be far from the chunk's own mean (`centre_is_poor`) is
the chunk measured again. So no data can mislead a pivot, and all depends on the shape alone.

Few channels make short rows, so loops run over a *band* of several rows at once, beside tables in
which each channel's number is repeated as often; their length is the `width`. Loops are functions
of their own, which take whole arrays and where to begin; see `numba_first`.

Threads share the chunks of one sample after the other, which so stays in a cache; small samples are
done by one thread each.
"""

import numpy as np

from groupnorm.backends.kernels.cpu.compiled.bands import (
    add,
    add_moments,
    add_moments_of_four,
    add_products,
    add_products_of_four,
    apply,
    apply_to_two,
    pull_back,
    pull_back_invalid,
    pull_back_two,
    repeat_rows,
    sum_rows,
)
from groupnorm.backends.kernels.cpu.compiled.elements import jit, load
from groupnorm.backends.kernels.cpu.compiled.moments import (
    LEAST,
    MOST,
    centre_is_poor,
    finite_float32,
    in_float64,
    inverse_deviation,
    mask_begins,
    sum_samples,
)
from groupnorm.backends.kernels.cpu.compiled.work_sharing import (
    claim_part,
    claim_task,
    finish,
    wait,
)

__all__ = ["channels_last_backward", "channels_last_forward"]

F, U = np.float32, np.uint64

# A chunk is measured around the mean of at least so many rows of it, and of so many bands.
SAMPLE_ROWS, SAMPLE_BANDS = 8, 4


# Statistics ---------------------------------------------------------------------------------------


@jit()
def _is_valid(mask, mask_at, row):
    return mask is None or mask[mask_at + row] != 0


@jit(apart=True)
def _choose(mask, mask_at, first, rows, channels, width, starts):
    """List the bands that count, by where they begin in the chunk; with a mask they are rows.

    After them comes where the rest begins, which is less than a band.
    """
    bands, step = 0, width // channels
    for row in range(0, rows - step + 1, step):
        if _is_valid(mask, mask_at, first + row):
            starts[bands] = row * channels
            bands += 1
    starts[bands] = rows // step * step * channels
    return bands


@jit(apart=True)
def _sample_mean(x, begin, starts, bands, left, channels, base, total, folded):
    """Let base be the mean of the first bands of a chunk, or of what is left without any."""
    n = base.size if bands > 0 else left
    for c in range(channels):
        base[c] = load(x, U(begin + starts[0] + c))
    repeat_rows(base, channels)
    total[:] = 0
    taken = min(max(bands, 1), max(SAMPLE_BANDS, SAMPLE_ROWS * channels // base.size))
    for i in range(taken):
        add(x, begin + starts[i], n, base, total)
    sum_rows(total, channels, folded)
    for c in range(channels):
        base[c] += F(folded[c] / (taken * n // channels))
    repeat_rows(base, channels)


@jit(apart=True)
def _take_moments(x, begin, starts, bands, left, base, total, squares):
    total[:] = 0
    squares[:] = 0
    q = bands // 4
    for i in range(q):
        add_moments_of_four(
            x, begin + starts[i], begin + starts[i + q], begin + starts[i + 2 * q],
            begin + starts[i + 3 * q], base, total, squares,
        )  # fmt: skip
    for i in range(4 * q, bands):
        add_moments(x, begin + starts[i], base.size, base, total, squares)
    add_moments(x, begin + starts[bands], left, base, total, squares)


@jit(apart=True)
def _measure(
    x, mask, mask_at, begin, first, rows, channels, base, total, squares, starts, mean, m2
):  # fmt: skip
    """Measure the channels of a chunk that begins at an element and a row; return the count."""
    width = base.size
    bands = _choose(mask, mask_at, first, rows, channels, width, starts)
    left = rows * channels % width  # less than a band; nothing where bands are rows
    n = bands * (width // channels) + left // channels
    if n == 0:
        mean[:] = 0.0
        m2[:] = 0.0
        return 0.0
    # mean and m2 lend their memory to the sums.
    _sample_mean(x, begin, starts, bands, left, channels, base, total, mean)
    for attempt in range(2):
        _take_moments(x, begin, starts, bands, left, base, total, squares)
        sum_rows(total, channels, mean)
        sum_rows(squares, channels, m2)
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
        m2[c] = rest if not rest < 0 else 0.0  # NaN stays NaN
    return float(n)


@jit(apart=True)
def _merge_chunk(n, count, means, m2s, at, mean, m2):
    """Merge one chunk's channels into all before it."""
    at = U(at)
    weight, product = n / (count + n), count * (n / (count + n))
    for c in range(mean.size):
        delta = means[at + U(c)] - mean[c]
        mean[c] += delta * weight
        m2[c] += m2s[at + U(c)] + delta * delta * product


@jit(apart=True)
def _merge(
    x, mask, mask_at, sample, groups, size, positions, epsilon, counts, means, m2s, mean, rstd,
    inv_count,
):  # fmt: skip
    """Merge the chunks of a sample into the numbers of its groups."""
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
            if not LEAST <= variance <= MOST:
                begin = sample * positions * channels + a
                _, group_mean, variance = in_float64(
                    x, begin, positions, channels, size, mask, mask_at, True
                )
        k = sample * groups + group
        mean[k], rstd[k] = group_mean, inverse_deviation(variance, epsilon)
        inv_count[k] = 1.0 / (count * size) if count > 0 else 0.0


@jit(apart=True)
def _set_tables(sample, groups, size, scale, bias, mean, rstd, centre, factor, term):
    """Let three tables be what is applied to a sample."""
    for group in range(groups):
        m, r = mean[sample * groups + group], rstd[sample * groups + group]
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


@jit(apart=True)
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
        valid = _is_valid(mask, mask_at, first + (a - begin) // channels)
        apply(x, y, a, min(width, end - a), valid, centre, factor, term, activation)


# The first two counters are of seats and of chunks that are done. Then come, for each sample, those
# of the chunks that were taken to be measured, by parts, one of those that were measured and, one
# more, whether they were merged, and those of the chunks that were taken to be applied, by parts.
# Threads that work apart use the first of these for samples.


@jit()
def _is_last(team, counter, task, chunks, apart):
    """Whether all chunks of a sample are measured now, so that they can be merged."""
    return task == chunks - 1 if apart else finish(team, counter, 1) == chunks


@jit()
def _part(room, number, length):
    """Return one of the equal parts of an array."""
    return room[number * length : (number + 1) * length]


@jit(apart=True)
def channels_last_forward(
    x, y, scale, bias, mask, groups, size, positions, samples, rows, width, apart, epsilon,
    activation, mean, rstd, inv_count, room, starts, tables, parts, team,
):  # fmt: skip
    """Measure and normalize all samples.

    Every thread has tables, (parts, 3, width), and starts, (parts, chunks' bands + 1), of its own.
    room (1, chunks * (1 + 2 * channels)) is the threads' common ground, for one sample at a time;
    if each does its samples `apart`, they have a part each.
    """
    channels = groups * size
    chunks = (positions + rows - 1) // rows
    seat = claim_part(team, 0, parts)
    # First of sums, then of what is applied.
    one, two, three = (
        _part(tables, 3 * seat, width), _part(tables, 3 * seat + 1, width),
        _part(tables, 3 * seat + 2, width),
    )  # fmt: skip
    starts = _part(starts, seat, starts.size // parts)
    ground = _part(room, seat if apart else 0, chunks * (1 + 2 * channels))
    counts, moments = ground[:chunks], ground[chunks:]
    means, m2s = _part(moments, 0, chunks * channels), _part(moments, 1, chunks * channels)
    for turn in range(samples):
        sample = claim_task(team, 2, parts, samples, seat) if apart else turn
        if sample < 0:
            break
        counter = 2 + turn * (2 * parts + 1)
        mask_at, begin = mask_begins(mask, sample, positions), sample * positions * channels
        for task in range(chunks):
            chunk = task if apart else claim_task(team, counter, parts, chunks, seat)
            if chunk < 0:
                break
            first = chunk * rows
            counts[chunk] = _measure(
                x, mask, mask_at, begin + first * channels, first, min(rows, positions - first),
                channels, one, two, three, starts, _part(means, chunk, channels),
                _part(m2s, chunk, channels),
            )  # fmt: skip
            if _is_last(team, counter + parts, task, chunks, apart):
                _merge(
                    x, mask, mask_at, sample, groups, size, positions, epsilon, counts, means, m2s,
                    mean, rstd, inv_count,
                )  # fmt: skip
                if not apart:
                    finish(team, counter + parts, 1)
        if not apart:
            wait(team, counter + parts, chunks + 1)
        ready = False
        for task in range(chunks):
            chunk = task if apart else claim_task(team, counter + parts + 1, parts, chunks, seat)
            if chunk < 0:
                break
            if not ready:  # not before: who comes too late may find only its own memory
                _set_tables(sample, groups, size, scale, bias, mean, rstd, one, two, three)
                ready = True
            first = chunk * rows
            _apply_chunk(
                x, y, mask, mask_at, begin + first * channels, first, min(rows, positions - first),
                channels, one, two, three, activation,
            )  # fmt: skip
            finish(team, 1, 1)
    wait(team, 1, samples * chunks)


@jit(apart=True)
def _sum_products(
    x, dy, mask, mask_at, begin, first, rows, channels, centre, factor, term, activation,
    total, weighted, sums, weighted_sums,
):  # fmt: skip
    """Sum dy and dy * (x - centre) of each channel of a chunk, in float64 at last."""
    width = centre.size
    step, at, end = width // channels, begin, begin + rows * channels
    total[:] = 0
    weighted[:] = 0
    if mask is None:
        quarter = rows // (4 * step) * width
        for a in range(begin, begin + quarter, width):
            add_products_of_four(
                x, dy, a, a + quarter, a + 2 * quarter, a + 3 * quarter, centre, factor, term,
                activation, total, weighted,
            )  # fmt: skip
        at += 4 * quarter
    for a in range(at, end, width):
        valid = _is_valid(mask, mask_at, first + (a - begin) // channels)
        add_products(
            x, dy, a, min(width, end - a), valid, centre, factor, term, activation, total, weighted
        )
    sum_rows(total, channels, sums)
    sum_rows(weighted, channels, weighted_sums)


@jit(apart=True)
def _merge_backward(
    scale, sample, groups, size, chunks, mean, rstd, inv_count, sums, weighted_sums, sum_dy,
    sum_dy_xhat, pulls,
):  # fmt: skip
    """Merge the chunks of a sample into its sums, and the means of two of them by groups."""
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
        pulls[2 * group], pulls[2 * group + 1] = p, q


@jit(apart=True)
def _set_pulling_tables(sample, groups, size, mean, rstd, pulls, rstds, slope, offset):
    """Let three tables be what dx needs: (p + xhat * q) * rstd.

    Where xhat is (x - centre - rest) * rstd.
    """
    for group in range(groups):
        m, r = mean[sample * groups + group], rstd[sample * groups + group]
        rest, p, q = m - np.float64(F(m)), pulls[2 * group], pulls[2 * group + 1]
        for c in range(group * size, (group + 1) * size):
            rstds[c] = finite_float32(r)
            slope[c] = finite_float32(r * q)
            offset[c] = finite_float32(r * (p - rest * r * q))
    repeat_rows(rstds, groups * size)
    repeat_rows(slope, groups * size)
    repeat_rows(offset, groups * size)


@jit(apart=True)
def _pull_back_chunk(
    x, dy, dx, mask, mask_at, begin, first, rows, channels, centre, factor, term, activation,
    rstd, slope, offset,
):  # fmt: skip
    width, at, end = centre.size, begin, begin + rows * channels
    if mask is None:
        half = rows * channels // (2 * width) * width
        for a in range(begin, begin + half, width):
            pull_back_two(
                x, dy, dx, a, a + half, centre, factor, term, rstd, slope, offset, activation
            )
        at += 2 * half
    for a in range(at, end, width):
        n = min(width, end - a)
        if _is_valid(mask, mask_at, first + (a - begin) // channels):
            pull_back(x, dy, dx, a, n, centre, factor, term, rstd, slope, offset, activation)
        else:
            pull_back_invalid(x, dy, dx, a, n, centre, factor, term, activation)


@jit(apart=True)
def channels_last_backward(
    x, dx, scale, bias, mask, groups, size, positions, samples, rows, width, apart, activation,
    mean, rstd, inv_count, dy, sums, batches, dscale, dbias, room, pulls, tables, parts, team,
):  # fmt: skip
    """Pull dy back through all samples.

    sums (2, N, channels) gets those over positions of dy and of dy * xhat, in float64; dscale and
    dbias (batches, channels) get what they sum up to. pulls is (N, groups, 2). Every thread has
    tables, (parts, 6, width), of its own; of room (1, 2 * chunks * channels) they have a part each
    if `apart`, as in `channels_last_forward`.
    """
    channels = groups * size
    chunks = (positions + rows - 1) // rows
    seat = claim_part(team, 0, parts)
    own = _part(tables, seat, 6 * width)
    centre, factor, term = _part(own, 0, width), _part(own, 1, width), _part(own, 2, width)
    # First of sums, then of what is applied.
    one, two, three = _part(own, 3, width), _part(own, 4, width), _part(own, 5, width)
    ground = _part(room, seat if apart else 0, 2 * chunks * channels)
    products, weighted = _part(ground, 0, chunks * channels), _part(ground, 1, chunks * channels)
    for turn in range(samples):
        sample = claim_task(team, 2, parts, samples, seat) if apart else turn
        if sample < 0:
            break
        counter = 2 + turn * (2 * parts + 1)
        mask_at, begin = mask_begins(mask, sample, positions), sample * positions * channels
        ready = False
        for task in range(chunks):
            chunk = task if apart else claim_task(team, counter, parts, chunks, seat)
            if chunk < 0:
                break
            if not ready:
                _set_tables(sample, groups, size, scale, bias, mean, rstd, centre, factor, term)
                ready = True
            first = chunk * rows
            _sum_products(
                x, dy, mask, mask_at, begin + first * channels, first,
                min(rows, positions - first), channels, centre, factor, term, activation, one, two,
                _part(products, chunk, channels), _part(weighted, chunk, channels),
            )  # fmt: skip
            if _is_last(team, counter + parts, task, chunks, apart):
                _merge_backward(
                    scale, sample, groups, size, chunks, mean, rstd, inv_count, products, weighted,
                    _part(sums, sample, channels), _part(sums, samples + sample, channels),
                    _part(pulls, sample, 2 * groups),
                )  # fmt: skip
                if not apart:
                    finish(team, counter + parts, 1)
        if not apart:
            wait(team, counter + parts, chunks + 1)
        pulling = False
        for task in range(chunks):
            chunk = task if apart else claim_task(team, counter + parts + 1, parts, chunks, seat)
            if chunk < 0:
                break
            if not ready:
                _set_tables(sample, groups, size, scale, bias, mean, rstd, centre, factor, term)
                ready = True
            if not pulling:
                _set_pulling_tables(
                    sample, groups, size, mean, rstd, _part(pulls, sample, 2 * groups), one, two,
                    three,
                )  # fmt: skip
                pulling = True
            first = chunk * rows
            _pull_back_chunk(
                x, dy, dx, mask, mask_at, begin + first * channels, first,
                min(rows, positions - first), channels, centre, factor, term, activation,
                one, two, three,
            )  # fmt: skip
            if finish(team, 1, 1) == samples * chunks:
                sum_samples(sums, samples, batches, channels, dscale, dbias)
                finish(team, 1, 1)
    wait(team, 1, samples * chunks + 1)
