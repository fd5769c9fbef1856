"""Convert weights to mindformers' form and back: python -m mindpangu.tools.convert mindformers teacher teacher_mf

    python -m mindpangu.tools.convert hugging_face teacher_mf teacher
    python -m mindpangu.tools.convert hugging_face output/checkpoint/iteration_00001000 trained --config teacher

mindformers' form: safetensors with the parameter names and layouts of its GPTModel (mindformers 1.9.0), which its
load_checkpoint reads, beside config.json and the tokenizer. Every value keeps its bits and its type, both ways. One
tensor is in memory at a time.
"""

import argparse

from mindpangu.model.mindformers import convert_to_hugging_face, convert_to_mindformers
from mindpangu.runtime.checkpoint import find_model


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m mindpangu.tools.convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("to", choices=("mindformers", "hugging_face"), help="the form to write")
    parser.add_argument("source", help="folder to read, in the other form; to mindformers also a run of mindpangu")
    parser.add_argument("folder", help="folder to write; it must not be there")
    parser.add_argument("--config", metavar="FOLDER", help="to hugging_face: folder with config.json and tokenizer, if "
                        "they are not in SOURCE, a checkpoint that mindformers wrote in training")
    parser.add_argument("--max-shard-gib", type=float, default=4.0, help="size of a file (%(default)s)")
    parsed = parser.parse_args(arguments)
    if parsed.max_shard_gib <= 0:
        parser.error(f"--max-shard-gib {parsed.max_shard_gib:g}: expected a positive number")
    try:
        if parsed.to == "hugging_face":
            convert_to_hugging_face(parsed.source, parsed.folder, parsed.config, parsed.max_shard_gib)
        elif parsed.config:
            raise ValueError("--config belongs to hugging_face; the other way config.json lies in the folder to read.")
        else:
            convert_to_mindformers(find_model(parsed.source), parsed.folder, parsed.max_shard_gib)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(parsed.folder)


if __name__ == "__main__":
    main()
