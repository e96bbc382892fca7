"""Print the top-level modules that are loaded by the statements in the only argument."""

import sys

before = set(sys.modules)
exec(sys.argv[1])
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(roots))
