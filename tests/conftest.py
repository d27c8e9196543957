"""What several test files share."""
import os

os.environ["HF_HUB_OFFLINE"] = "1"      # no test needs a network; read when transformers is imported
