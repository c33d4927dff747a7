"""The data plane: serves models. `server._native` is built from ext/."""

import os

# A sanitizer or debug build of the native module lies outside the package; `import server._native` finds it first.
if _folder := os.environ.get("TIDEGATE_NATIVE_DIR"):
    __path__.insert(0, _folder)
