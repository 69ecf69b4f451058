"""The registry of shared options: one name, one meaning, one text in every command.

Source, Sources, Output     where bytes come from and go to          all
ModelFile, ArchName         the model, and leave to run its code     attack, saliency, invert, score
Seed, Block, Shard          what and how much is computed            all that compute
Device, Threads             where it is computed                     all that compute
Quiet, NoHistory            what is said and recorded                all
NoClobber                   whether outputs may be replaced          all that write files
MaxDocument                 safety limit of readers                  all that read

UNRECORDED names the options that do not reach an output's history, because equal inputs must give equal bytes
wherever, in however many pieces and under whatever names they were made.
"""

from __future__ import annotations

from typing import Annotated

import typer

UNRECORDED = {
    "source", "sources", "output", "model", "models", "arch", "shard", "device", "threads", "quiet", "no_history",
    "max_document", "max_pixels", "download", "json_", "root", "paths", "last", "log", "resume", "init",
    "checkpoint_every", "no_clobber", "manifest", "classes_of",
}  # fmt: skip

Source = Annotated[str, typer.Argument(metavar="[FILE]", help="Input stream; - is standard input.", show_default=False)]
Sources = Annotated[
    list[str] | None, typer.Argument(metavar="[FILE]...", help="Input streams; none or - is standard input.")
]
Output = Annotated[
    str,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        help="Where to write: .safetensors (one document), .rbs (a stream), .png or a folder/ (pictures); - is standard output.",
    ),
]
ModelFile = Annotated[
    str, typer.Option("-m", "--model", metavar="FILE", help="The model, a file of rb-train or rb-model.")
]
ModelFiles = Annotated[
    list[str] | None,
    typer.Option("-m", "--model", metavar="FILE", help="A model; may be repeated.", show_default=False),
]
ArchName = Annotated[
    list[str] | None,
    typer.Option(
        "--arch",
        metavar="MODULE:FACTORY",
        help="Leave to import and run this factory, which the model file must name too; may be repeated.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, max=2**63 - 1, help="Seed of every random number.")]
Block = Annotated[
    int | None,
    typer.Option(
        "--block",
        metavar="N",
        min=32,
        help="Rows computed at a time, a multiple of 32; default 64, on a GPU 512; recorded, as it moves last bits.",
        show_default=False,
    ),
]
Shard = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="K/N",
        help="Only the K-th of N contiguous parts of the whole input (from 1); slurm or slurm/N: by the array task.",
        show_default=False,
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N; auto takes a GPU where there is one."),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", min=1, envvar="RB_THREADS", help="CPU threads; default: what affinity and quota allow.",
        show_default=False, show_envvar=True,
    ),
]  # fmt: skip
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on standard error.")]
NoHistory = Annotated[bool, typer.Option("--no-history", help="Leave the history out of the output.")]
NoClobber = Annotated[
    bool, typer.Option("--no-clobber", help="Refuse outputs that are already there; the default is to replace them.")
]
MaxDocument = Annotated[
    int, typer.Option("--max-document", metavar="BYTES", min=1, help="Refuse documents larger than this.")
]
Norm = Annotated[str, typer.Option("--norm", metavar="l2|linf", help="Norm of the perturbation.")]
EPS_HELP = "Radius in [0, 1] pixel units, of the whole image; 8/255 is accepted."
Json = Annotated[bool, typer.Option("--json", help="JSON lines, also on a terminal.")]

DOCUMENT_LIMIT = 16 << 30  # = formats.document.MAX_DOCUMENT, which would cost numpy to import here
