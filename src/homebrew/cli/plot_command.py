"""`homebrew plot`: draw the curves of runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from homebrew.errors import ConfigError
from homebrew.io import absolute_path, atomic_replace, write_errors


@dataclass(kw_only=True)
class Plot:
    """Draw the curves of runs: loss, learning rate, gradient norm and tokens/s. Needs matplotlib.

    Several runs are drawn in one image, with a legend of the settings that differ.
    """

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")]] = ()
    """Folders of runs, or folders that contain runs. A run may be in progress."""
    output: Annotated[Path | None, arg(help_behavior_hint="(default: curves.png)")] = None
    """Image to write, a .png or .svg file. The default is written into the run's folder or, for several runs, into the
    current folder. With --html, no image is written by default."""
    html: Annotated[Path | None, arg(help_behavior_hint="")] = None
    """HTML page to write, an .html file with the curves, the run's settings and the samples of --sample-every."""
    x: Literal["steps", "tokens", "seconds"] = "steps"
    """Unit of the x-axis."""
    log_x: bool = False
    """Make the x-axis logarithmic."""

    def run(self) -> None:
        """Run the command."""
        if not self.runs:
            raise ConfigError("No run is given. Pass the folder of one or more runs.")
        for path, suffixes in ((self.output, (".png", ".svg")), (self.html, (".html", ".htm"))):
            if path is not None and path.suffix.lower() not in suffixes:
                raise ConfigError(f"{path} has an unknown suffix. Use {' or '.join(suffixes)}.")
        from homebrew.plotting.curves import curves_image
        from homebrew.plotting.html_page import html_page
        from homebrew.plotting.run_record import read_runs

        runs = read_runs(self.runs)
        output = self.output
        if output is None and self.html is None:
            output = (runs[0].folder if len(runs) == 1 else Path()) / "curves.png"
        if output is not None:
            kind: Literal["png", "svg"] = "svg" if output.suffix.lower() == ".svg" else "png"
            _write(output, curves_image(runs, kind=kind, x=self.x, log_x=self.log_x))
        if self.html is not None:
            _write(self.html, html_page(runs, x=self.x, log_x=self.log_x).encode())


def _write(path: Path, data: bytes) -> None:
    with write_errors(path, ConfigError, "Choose another file."), atomic_replace(absolute_path(path)) as temporary:
        temporary.write_bytes(data)
    print(f"Wrote {path}")
