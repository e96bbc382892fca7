"""The portable implementation: group normalization in array API terms, for every library.

Reading order: `groupnorm.plan` (shapes and axes), then ``inputs`` (to the work shape and back),
``statistics`` (count, mean and sum of squares of every group; how accuracy is preserved),
``backward``, ``merge`` (statistics of several parts), ``group_norm`` (one call, start to end).
``pivots``, ``blocked_sums``, ``complex_parts`` and ``activations`` hold shared arithmetic;
``collectives`` and ``agreement`` exchange statistics between replicas;
``public_statistics`` converts to and from the public shape of statistics.
"""
