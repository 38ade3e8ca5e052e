"""Part of the package's build: compile the kernels of `prunekit.runtime`. Without a C compiler the package is built without them."""

from __future__ import annotations

import runpy
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileKernels(BuildHookInterface[Any]):
    """Puts the library next to its Python module, in the wheel and in the source tree of an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and give the wheel the platform's name; or say why not."""
        build = runpy.run_path(str(Path(self.root) / "src/prunekit/runtime/build.py"))
        compiler, library = build["find_compiler"](), build["LIBRARY"]
        library.unlink(missing_ok=True)  # of an earlier build
        try:
            if compiler is None:
                raise OSError("there is no C compiler")
            build["compile_library"](library, compiler)
        except (OSError, subprocess.CalledProcessError) as problem:
            reason = getattr(problem, "stderr", None) or problem
            self.app.display_warning(f"built without the kernels of the sparse runtime: {reason}")
            return
        build_data["artifacts"].append(str(library.relative_to(self.root)))
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
