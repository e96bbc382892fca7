"""Print which top-level modules running the statements given as the only argument loads."""

import sys

before = set(sys.modules)
exec(sys.argv[1])
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(roots))
