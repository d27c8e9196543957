"""Write the answer files that the judges of MT-Bench and AlpacaEval 2.0 read.

    python bench/answers.py mt-bench MODEL question.jsonl data/mt_bench/model_answer/NAME.jsonl
    python bench/answers.py alpaca-eval MODEL alpaca_eval.json outputs.json

The judging itself needs the judges' API and is not done here. MODEL is a folder or Hub name of a
model with a chat template. The judges know the model by the name of the answer file.

question.jsonl holds FastChat's 80 questions of two turns. Temperatures go by category, as in
FastChat. alpaca_eval.json is a JSON list (or one JSON object per line), with an `instruction` in
each entry. AlpacaEval's answers are greedy.

--max_new_tokens N  longest answer, in tokens (1024 for MT-Bench, 2048 for AlpacaEval)
--batch N           conversations that are answered together (8)
--limit N           answer the first N questions only (all)
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

# FastChat's temperatures; the other categories are answered greedily.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}


def answer(model, tokenizer, conversations: list[list[dict]], temperatures: list[float],
           max_new_tokens: int, batch: int) -> list[str]:
    """The model's next turn in each conversation, in their order.

    Conversations with the same temperature are answered together, at most `batch` at a time, sorted
    by length. Where the model has a limit of positions, an answer gets at most half of them, and
    the beginning of a longer conversation is cut off.
    """
    eos_ids = model.generation_config.eos_token_id or tokenizer.eos_token_id
    text_config = model.config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None) or sys.maxsize
    max_new_tokens = min(max_new_tokens, positions // 2)
    prompts = [
        tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        for turns in conversations]
    order = sorted(range(len(prompts)), key=lambda i: (temperatures[i], len(prompts[i])))
    answers = {}
    while order:
        temperature = temperatures[order[0]]
        together = [i for i in order[:batch] if temperatures[i] == temperature]
        order = order[len(together):]
        generated = generate_segments(
            model, [prompts[i][-(positions - max_new_tokens):] for i in together], max_new_tokens,
            eos_token_id=eos_ids, temperature=temperature, top_k=0, top_p=1.0,
            generator=torch.Generator(model.device).manual_seed(together[0]))
        for i, (tokens,) in zip(together, generated, strict=True):
            answers[i] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return [answers[i] for i in range(len(prompts))]


def mt_bench(model, tokenizer, questions: list[dict], name: str, options) -> str:
    """FastChat's model_answer file: one line per question, with the answers of all turns.

    All first turns are answered before the second turns are asked.
    """
    temperatures = [TEMPERATURES.get(question["category"], 0.0) for question in questions]
    conversations = [[] for _ in questions]
    answers = [[] for _ in questions]           # per question, one answer per turn
    for turn in range(max(len(question["turns"]) for question in questions)):
        for conversation, question in zip(conversations, questions, strict=True):
            conversation.append({"role": "user", "content": question["turns"][turn]})
        texts = answer(model, tokenizer, conversations, temperatures,
                       options.max_new_tokens or 1024, options.batch)
        for conversation, turns, text in zip(conversations, answers, texts, strict=True):
            conversation.append({"role": "assistant", "content": text})
            turns.append(text)
    lines = []
    for question, turns in zip(questions, answers, strict=True):
        question_id = question["question_id"]
        lines.append(json.dumps({
            "question_id": question_id,
            "answer_id": uuid.uuid5(uuid.NAMESPACE_URL, f"{name}/{question_id}").hex,
            "model_id": name,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time()}) + "\n")
    return "".join(lines)


def alpaca_eval(model, tokenizer, questions: list[dict], name: str, options) -> str:
    """AlpacaEval's model outputs: a JSON list of instruction, output, generator and dataset."""
    conversations = [
        [{"role": "user", "content": question["instruction"]}] for question in questions]
    outputs = answer(model, tokenizer, conversations, [0.0] * len(questions),
                     options.max_new_tokens or 2048, options.batch)
    entries = [
        {"instruction": question["instruction"], "output": output, "generator": name,
         "dataset": question.get("dataset", "")}
        for question, output in zip(questions, outputs, strict=True)]
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"


def read_questions(path: str, field: str) -> list[dict]:
    """The questions of a JSON list or of JSON lines.

    Raises OSError or ValueError on a file that can't be read, that has no questions, or in which a
    question lacks `field`.
    """
    text = Path(path).read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        questions = json.loads(text)
    else:
        questions = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not questions:
        raise ValueError("this file has no questions")
    if not all(field in question for question in questions):
        raise ValueError(f"every question needs the field `{field}`")
    return questions


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="answers.py",
        usage="answers.py mt-bench|alpaca-eval MODEL QUESTIONS ANSWERS [--flag value]")
    parser.add_argument("bench", choices=["mt-bench", "alpaca-eval"])
    for name in ("model", "questions", "answers"):
        parser.add_argument(name)
    parser.add_argument("--max_new_tokens", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args(argv)
    if options.bench == "mt-bench":
        write, field = mt_bench, "turns"
    else:
        write, field = alpaca_eval, "instruction"
    try:
        questions = read_questions(options.questions, field)[:options.limit]
    except (OSError, ValueError) as error:
        sys.exit(f"answers.py: {options.questions}: {error}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        sys.exit(f"answers.py: {options.model}: can't load a model from there ({first_line})")
    if not tokenizer.chat_template:
        sys.exit(f"answers.py: {options.model}: its tokenizer has no chat template")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    path = Path(options.answers)
    text = write(model, tokenizer, questions, path.stem, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"{len(questions)} questions answered by {options.model}: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
