"""Write the tokenizer and the configurations of the small models that come with this repository.

    python data/make_tokenizer.py               # tokenizer and configurations, in data/model*
    torchrun train.py @recipes/demo-sft.txt             # the weights of data/model
    torchrun train.py @recipes/base-same-rows.txt       # the weights of data/model-same-rows
    torchrun train.py @recipes/base-habits.txt          # the weights of data/model-habits
    torchrun train.py @recipes/base-free-wording.txt    # the weights of data/model-free-wording
    torchrun train.py @recipes/base-no-habit.txt        # the weights of data/model-no-habit

The script reads train.jsonl beside this file. The tokenizer is a byte-level BPE learned on the
training rows. Digits stay single tokens, so that the model can learn sums. The chat template is
ChatML, as in the paper's Appendix B. The configurations are those of small Llamas.
"""
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent
VOCABULARY = 640
# The hidden size of each model. Those with 40 can't get every row right: too small for that.
HIDDEN_SIZES = {"model": 64, "model-same-rows": 40, "model-habits": 40, "model-free-wording": 40,
                "model-no-habit": 40}
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def texts() -> Iterator[str]:
    """Each training row as text: the role and content of every message."""
    with open(FOLDER / "train.jsonl", encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            messages = row["prompt"] + row["chosen"]
            yield "".join(f"{message['role']}\n{message['content']}\n" for message in messages)


def main() -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?\d|\n| ?[^\s\d]+|\s"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"], model_max_length=512)
    tokenizer.chat_template = CHATML
    eos_id = tokenizer.eos_token_id
    for name, hidden_size in HIDDEN_SIZES.items():
        tokenizer.save_pretrained(FOLDER / name)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=3 * hidden_size,
            num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
            max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=eos_id, pad_token_id=eos_id, dtype="float32",
            architectures=["LlamaForCausalLM"])
        config.save_pretrained(FOLDER / name)


if __name__ == "__main__":
    main()
