"""Convert official PyTorch weights into a model directory, and back.

Examples:
  aim-jax convert to-jax --weights aim-large --out models/aim_l
  aim-jax convert to-jax --weights vq_ds16_c2i.pt --out models/vq_f16
  aim-jax convert to-jax --weights last.ckpt --weights_key state_dict --prefix model. --out mine
  aim-jax convert to-torch --checkpoint models/aim_l --out aim_l.safetensors
  aim-jax convert inception --weights inception-2015-12-05.pt --out inception.safetensors
  aim-jax convert lpips --weights vgg16.pth --heads vgg.pth --out lpips.safetensors

Weights are a .safetensors file, a PyTorch pickle (.bin, .pt), an index of several files, or a
directory with one of these. Of a checkpoint with a moving average ("ema") beside the model, the
average is taken; --weights_key names another dictionary. PyTorch is not needed. See the page
"Released weights" of the documentation for details.
"""

import argparse
from collections.abc import Sequence

DTYPES = ("float32", "float16", "bfloat16")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="aim-jax convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    programs = parser.add_subparsers(dest="program", required=True)
    jax = programs.add_parser("to-jax", help="official weights -> model directory")
    jax.add_argument("--weights", required=True, help="file or directory of official weights")
    jax.add_argument("--vq", help="tokenizer to use, if --weights holds none or another one")
    jax.add_argument("--config", help="config.json of the weights (default: the one beside them)")
    jax.add_argument("--out", required=True, help="model directory to create")
    jax.add_argument(
        "--position_offset",
        type=int,
        choices=(0, 1),
        default=1,
        help="1: positions of the official sampler; 0: positions of the official training "
        "(default: 1)",
    )
    jax.add_argument(
        "--adaln", choices=("layer", "single", "group"), help="convert to this adaLN arrangement"
    )
    jax.add_argument(
        "--num_groups", type=int, default=4, help="groups of --adaln group (default: 4)"
    )
    jax.add_argument(
        "--approximate",
        action="store_true",
        help="allow an arrangement that cannot represent the model exactly",
    )
    jax.add_argument(
        "--class_names",
        help="text file with one name per line (default for 1000 classes: ImageNet's)",
    )
    torch = programs.add_parser("to-torch", help="model directory -> official weights")
    torch.add_argument(
        "--checkpoint", required=True, help="model directory, workdir or bundled model"
    )
    torch.add_argument(
        "--out",
        required=True,
        help="*.safetensors, *.bin, *.pt (tokenizer only), "
        "or a directory for config.json and model.safetensors",
    )
    inception = programs.add_parser(
        "inception", help="Inception network for FID -> .safetensors file"
    )
    inception.add_argument(
        "--weights", required=True, help="any file of the 2015 Inception network"
    )
    inception.add_argument("--out", required=True, help="*.safetensors")
    lpips = programs.add_parser("lpips", help="network of the perceptual loss -> .safetensors file")
    lpips.add_argument("--weights", required=True, help="VGG16, with or without the linear heads")
    lpips.add_argument("--heads", help="linear heads, if --weights lacks them")
    lpips.add_argument("--out", required=True, help="*.safetensors")
    for program in (jax, inception, lpips):
        add_choice(program, "weights")
    add_choice(jax, "vq", "vq_")
    for program in (jax, torch):
        program.add_argument(
            "--dtype", choices=DTYPES, help="dtype of the weights (default: that of the source)"
        )
    return parser.parse_args(argv)


def add_choice(program: argparse.ArgumentParser, of: str, start: str = "") -> None:
    """Add the options that choose among the tensors of a checkpoint."""
    program.add_argument(
        f"--{start}weights_key",
        default="",
        metavar="NAME",
        help=f"dictionary in the pickle --{of} to read, such as ema, model or state_dict; dots "
        "between nested names (default: a moving average if there is one, else the model)",
    )
    program.add_argument(
        f"--{start}prefix",
        default="",
        help=f"take only the tensors of --{of} whose names start with this, without it (prefixes "
        "of Lightning, FSDP, torch.compile and averaged models are known)",
    )


def main(arguments: Sequence[str]) -> None:
    """Convert the weights and print the path of the result."""
    args = parse(arguments)
    from aim_jax.utils.logging import say
    from aim_jax.utils.names import read_names
    from aim_jax.weights import convert
    from aim_jax.weights.formats.files import save_tensors
    from aim_jax.weights.load import find_model

    if args.program == "inception":
        from aim_jax.weights.convert.inception import load_inception

        out = save_tensors(load_inception(args.weights, args.weights_key, args.prefix), args.out)
    elif args.program == "lpips":
        from aim_jax.weights.convert.lpips import load_lpips

        params = load_lpips(args.weights, args.heads, args.weights_key, args.prefix)
        out = save_tensors(params, args.out)
    elif args.program == "to-torch":
        out = convert.to_torch(find_model(args.checkpoint), args.out, args.dtype)
    else:
        names = read_names(args.class_names) if args.class_names else None
        adaln = "group" if args.adaln == "single" else args.adaln
        out = convert.to_jax(
            args.weights, args.out, vq=args.vq, config=args.config, dtype=args.dtype,
            position_offset=args.position_offset, adaln=adaln,
            num_groups=1 if args.adaln == "single" else args.num_groups,
            approximate=args.approximate, class_names=names,
            weights_key=args.weights_key, prefix=args.prefix,
            vq_weights_key=args.vq_weights_key, vq_prefix=args.vq_prefix,
        )  # fmt: skip
    say(f"wrote {out}")
