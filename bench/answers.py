"""Write the answer files that the judges of MT-Bench and AlpacaEval 2.0 read; the judging itself needs their API.

    python bench/answers.py mt-bench MODEL question.jsonl data/mt_bench/model_answer/NAME.jsonl
    python bench/answers.py alpaca-eval MODEL alpaca_eval.json outputs.json

MODEL: a folder or hub name with a chat template; the judges know it by the name of the answer file. question.jsonl:
FastChat's 80 questions of two turns. alpaca_eval.json: a JSON list (or lines) with an `instruction` each. MT-Bench's
temperatures go by category, as FastChat has them; AlpacaEval's answers are greedy. --max_new_tokens N (1024 and 2048), --batch N (8), --limit N (all).
"""
import argparse
import json
import sys
import time
import uuid
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sapo import generate_segments

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}       # FastChat's; the other categories: 0


def answer(model, tokenizer, conversations: list[list[dict]], temperatures: list[float], max_new_tokens: int, batch: int) -> list[str]:
    """The model's next turn in each conversation; alike temperatures and lengths are generated together."""
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    ids = [tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) for turns in conversations]
    order = sorted(range(len(ids)), key=lambda i: (temperatures[i], len(ids[i])))
    answers, positions = {}, getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    new = min(max_new_tokens, positions // 2)
    while order:
        together = [i for i in order[:batch] if temperatures[i] == temperatures[order[0]]]
        order = order[len(together):]
        prefixes = [ids[i][-(positions - new):] for i in together]
        found = generate_segments(model, prefixes, new, eos_token_id=ends, temperature=temperatures[together[0]], top_k=0,
                                  top_p=1.0, generator=torch.Generator(model.device).manual_seed(together[0]))
        answers |= {i: tokenizer.decode(tokens, skip_special_tokens=True).strip() for i, (tokens,) in zip(together, found)}
    return [answers[i] for i in range(len(ids))]


def mt_bench(model, tokenizer, questions: list[dict], name: str, options) -> str:
    """FastChat's model_answer file: a line a question, both turns, the second asked after the first was answered."""
    temperatures = [TEMPERATURES.get(question["category"], 0.0) for question in questions]
    conversations, turns = [[] for _ in questions], [[] for _ in questions]
    for turn in range(max(len(question["turns"]) for question in questions)):
        for conversation, question in zip(conversations, questions):
            conversation.append({"role": "user", "content": question["turns"][turn]})
        for conversation, said, text in zip(conversations, turns, answer(model, tokenizer, conversations, temperatures, options.max_new_tokens or 1024, options.batch)):
            conversation.append({"role": "assistant", "content": text})
            said.append(text)
    return "".join(json.dumps({"question_id": question["question_id"], "answer_id": uuid.uuid5(uuid.NAMESPACE_URL, f"{name}/{question['question_id']}").hex,
                               "model_id": name, "choices": [{"index": 0, "turns": said}], "tstamp": time.time()}) + "\n"
                   for question, said in zip(questions, turns))


def alpaca_eval(model, tokenizer, questions: list[dict], name: str, options) -> str:
    """AlpacaEval's model outputs: a JSON list of instruction, output, generator."""
    conversations = [[{"role": "user", "content": question["instruction"]}] for question in questions]
    outputs = answer(model, tokenizer, conversations, [0.0] * len(questions), options.max_new_tokens or 2048, options.batch)
    return json.dumps([{"instruction": question["instruction"], "output": output, "generator": name, "dataset": question.get("dataset", "")}
                       for question, output in zip(questions, outputs)], indent=2, ensure_ascii=False) + "\n"


def read(path: str, needed: str) -> list[dict]:
    text = Path(path).read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line.strip()]
    if not rows or not all(needed in row for row in rows):
        raise ValueError(f"expected questions with `{needed}`")
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="answers.py", usage="answers.py mt-bench|alpaca-eval MODEL QUESTIONS ANSWERS [--flag value]")
    parser.add_argument("bench", choices=["mt-bench", "alpaca-eval"])
    for name in ("model", "questions", "answers"):
        parser.add_argument(name)
    parser.add_argument("--max_new_tokens", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args(argv)
    try:
        questions = read(options.questions, "turns" if options.bench == "mt-bench" else "instruction")[:options.limit]
    except (OSError, ValueError) as error:
        sys.exit(f"answers.py: {options.questions}: {error}")
    try:
        tokenizer, model = AutoTokenizer.from_pretrained(options.model), AutoModelForCausalLM.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        sys.exit(f"answers.py: {options.model}: no model there ({str(error).splitlines()[0]})")
    if not tokenizer.chat_template:
        sys.exit(f"answers.py: {options.model}: its tokenizer has no chat template")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    text = (mt_bench if options.bench == "mt-bench" else alpaca_eval)(model, tokenizer, questions, Path(options.answers).stem, options)
    Path(options.answers).parent.mkdir(parents=True, exist_ok=True)
    Path(options.answers).write_text(text, encoding="utf-8")
    print(f"{len(questions)} questions answered by {options.model}: {options.answers}")


if __name__ == "__main__":
    main(sys.argv[1:])
