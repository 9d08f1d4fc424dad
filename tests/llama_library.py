"""llama-cpp-python as it comes, but for what crashes in it.

`python -m tests.llama_library ARGUMENTS` is its server. Owns the one exception that tests need to
use it beside this project's own backend, which makes the same one.
"""

from __future__ import annotations

import llama_cpp.llama_cpp as lib


def leave_out_amx() -> None:
    """Load models without the matrix products for AMX where it was compiled with them.

    They end in SIGILL, see `w2c_tui.backends.llama`. The classes of llama-cpp-python have no
    parameter for it, so their defaults are other ones from here on.
    """
    defaults = lib.llama_model_default_params
    if b"AMX_INT8 = 1" not in lib.llama_print_system_info():
        return

    def without_extra_buffers() -> lib.llama_model_params:
        params = defaults()
        params.use_extra_bufts = False
        return params

    lib.llama_model_default_params = without_extra_buffers


leave_out_amx()

if __name__ == "__main__":
    from llama_cpp.server.__main__ import main

    main()
