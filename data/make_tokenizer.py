"""Write the demo model's tokenizer and configuration into data/model.

    python data/make_tokenizer.py               # tokenizer and configuration
    torchrun train.py @recipes/demo-sft.txt     # the weights

The script reads train.jsonl beside this file. The tokenizer is a byte-level BPE learned on the
training rows. Digits stay single tokens, so that the model can learn sums. The chat template is
ChatML, as in the paper's Appendix B. The configuration is that of a small Llama.
"""
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent
VOCABULARY = 640
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
    tokenizer.save_pretrained(FOLDER / "model")
    eos_id = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=eos_id, pad_token_id=eos_id,
        dtype="float32", architectures=["LlamaForCausalLM"])
    config.save_pretrained(FOLDER / "model")


if __name__ == "__main__":
    main()
