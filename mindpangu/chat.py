"""Talk to a trained model: python -m mindpangu.chat RUN ["prompt" ...]

RUN is a run folder, a checkpoint or a Hugging Face folder with tokenizer.model. With prompts, each is answered by
itself; without, a conversation goes on line by line until an empty line.
"""

import argparse
import sys

from mindpangu.config import RunConfig
from mindpangu.data.chat import decode_response, encode_prompt
from mindpangu.data.documents import Message
from mindpangu.data.tokenizer import Tokenizer
from mindpangu.runtime.checkpoint import find_model
from mindpangu.runtime.device import start


def answer_all(folder, conversations, *, max_new_tokens, temperature, seed, device="CPU"):
    """An assistant's Message for each conversation (lists of Message that end with the user's)."""
    start(RunConfig(device=device, kernels="native" if device == "Ascend" else "reference"))
    from mindpangu.model.generate import Generator
    from mindpangu.model.weights import load_model

    tokenizer, model = Tokenizer(folder / "tokenizer.model"), load_model(folder)
    prompts = [encode_prompt(tokenizer, messages) for messages in conversations]
    longest, limit = max(map(len, prompts)), model.config.max_seq_len
    if longest >= limit:
        raise ValueError(f"the conversation has {longest} tokens, the model takes {limit}: start a new one.")
    max_new_tokens = min(max_new_tokens, limit - longest)
    # A rounded prompt length lets the next turns of a conversation use the same compiled graph.
    prompt_len = min(-(-longest // 64) * 64, limit - max_new_tokens)
    generator = Generator(model, num_slots=len(prompts), prompt_len=prompt_len, max_new_tokens=max_new_tokens,
                          eos_id=tokenizer.turn_end_id, pad_id=tokenizer.pad_id, temperature=temperature)
    answers = generator.generate(prompts, [(seed, i, 0) for i in range(len(prompts))])
    return [decode_response(tokenizer, answer.tokens) for answer in answers]


def show(message):
    """The answer as a user reads it; thoughts, where there are any, come first in brackets."""
    return (f"[{message.thoughts}]\n" if message.thoughts is not None else "") + message.content


def main():
    parser = argparse.ArgumentParser(prog="python -m mindpangu.chat", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run, checkpoint or Hugging Face folder")
    parser.add_argument("prompts", nargs="*", help="what the user says; without, read from the terminal")
    parser.add_argument("--system", default="", help="the system message (empty)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely answer (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--device", choices=("CPU", "Ascend"), default="CPU", help="where to run (CPU)")
    arguments = parser.parse_args()
    options = {"max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature,
               "seed": arguments.seed, "device": arguments.device}
    system = [Message("system", arguments.system)] if arguments.system else []
    try:
        if arguments.max_new_tokens < 1 or arguments.temperature < 0:
            raise ValueError(f"--max-new-tokens {arguments.max_new_tokens}, --temperature {arguments.temperature}: "
                             "expected at least 1 and at least 0.")
        folder = find_model(arguments.run)
        if arguments.prompts:
            conversations = [[*system, Message("user", prompt)] for prompt in arguments.prompts]
            answers = answer_all(folder, conversations, **options)
            for prompt, message in zip(arguments.prompts, answers, strict=True):
                print(f"> {prompt}\n{show(message)}\n")
            return
        conversation = list(system)
        while line := _read_line():
            conversation.append(Message("user", line))
            [message] = answer_all(folder, [conversation], **options)
            conversation.append(message)
            print(show(message))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def _read_line():
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    main()
