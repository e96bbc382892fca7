"""The cases of other libraries' own tests of their group norm, rewritten for this library.

One file per library. A case compares three results: the library's, ours and the float64 oracle's,
so that it is shown to be the same case, and no error is shared. Where the library is wrong, the
file's ``DIFFERENT_ON_PURPOSE`` has an entry, and a test shows that the entry is still true.
"""
