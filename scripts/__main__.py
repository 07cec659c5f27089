"""`python -m scripts COMMAND`: the commands that MONAI's bundle commands don't cover."""

import fire

from scripts.errors import show_input_errors_in_one_line
from scripts.phantom import phantom

if __name__ == "__main__":
    show_input_errors_in_one_line()
    fire.Fire({"phantom": phantom}, name="python -m scripts")
