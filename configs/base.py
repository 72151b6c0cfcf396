"""The base model and the defaults of all configuration fields.

Without `data.path` and `data.name`, it trains on Python's standard library. All other files in this
directory override fields of `base`. Any field can be set on the command line with
`--config.section.field=value`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """44.6M parameters with a vocabulary of 50257, for one GPU."""
    c = ConfigDict()
    c.seed = 42  # initial weights, data order, dropout

    c.model = ConfigDict()
    c.model.d_model = 512  # width of the residual stream
    c.model.num_layers = 6
    c.model.num_heads = 8
    c.model.num_kv_heads = 0  # key/value heads of grouped-query attention; 0 = num_heads
    c.model.head_dim = 0  # width of one head; 0 = d_model / num_heads
    c.model.d_ff = 2048  # width of the feed-forward layer
    c.model.max_seq_len = 512  # maximum context in tokens
    c.model.dropout = 0.1  # on the embedding and each sublayer output
    c.model.attention_dropout = 0.0  # on attention weights; above 0 disables cuDNN attention
    c.model.norm = "layernorm"  # layernorm | rmsnorm
    c.model.norm_eps = 1e-5  # added to the variance (layernorm) or the mean square (rmsnorm)
    c.model.feed_forward = "mlp"  # mlp: W2 act(W1 x) | gated: W2 (act(Wg x) * W1 x), as SwiGLU
    c.model.activation = "gelu"  # gelu (exact) | gelu_tanh | relu | relu2 | silu
    c.model.position = "rope"  # rope | sinusoidal | learned
    c.model.rope_theta = 10000.0  # base of the RoPE wavelengths
    c.model.partial_rotary = 1.0  # fraction of each head's width that RoPE rotates
    # For contexts longer than a model was trained on: none | linear (positions divided by the
    # factor) | llama3 (only wavelengths above original_length / high_freq_factor, fully above
    # original_length / low_freq_factor)
    c.model.rope_scaling = "none"
    c.model.rope_scaling_factor = 8.0
    c.model.rope_low_freq_factor = 1.0  # llama3 only, as the next two
    c.model.rope_high_freq_factor = 4.0
    c.model.rope_original_length = 8192  # context before the scaling
    c.model.use_bias = False  # biases in linear layers (LayerNorm always has one)
    c.model.qkv_bias = False  # biases in the query, key and value layers alone
    c.model.qk_norm = False  # RMSNorm of each head's queries and keys, before RoPE
    c.model.parallel_residual = False  # x + attention(norm x) + feed_forward(norm x)
    c.model.sliding_window = 0  # tokens that a query attends to, itself included; 0 = all before it
    c.model.logit_softcap = 0.0  # logits become cap * tanh(logits / cap); 0 = off
    c.model.tie_embeddings = True  # share the output layer with the token embedding
    # Rematerialization: none | dots (recompute all but weight matmuls: about half the memory for a
    # few percent of time) | full (recompute each block: a third more time)
    c.model.remat = "none"

    c.data = ConfigDict()
    # auto (path by suffix, else name, else stdlib) | files | json | csv | quoted_tsv | parquet
    # | hub | pdf | sql | stdlib
    c.data.source = "auto"
    c.data.path = ""  # file, directory, glob or URL; or several, comma-separated
    c.data.val_path = ""  # validation text, read like path; "" = split off val_fraction
    c.data.name = ""  # Hugging Face dataset, or a directory with a local copy
    c.data.subset = ""  # configuration of the dataset, e.g. "wikitext-103-raw-v1"
    c.data.text_column = "text"  # tables, hub, sql: the text column, or a dotted path
    c.data.join_rows = False  # rows are lines of one text instead of documents
    c.data.query = ""  # sql: a SELECT; path is a SQLite file or postgresql://user@host/db
    c.data.mixture = ConfigDict()  # weighted sources; see configs/mixture.py
    c.data.format = "text"  # text | chat (rows are conversations; needs packing = "whole")
    c.data.broken_rows = "error"  # chat: rows that are no conversation: error | skip (counted)
    # chat: sheepop | chatml | llama3 | qwen; "" = that of the tokenizer of an imported chat model
    c.data.chat_template = "sheepop"
    c.data.chat_loss = "assistant"  # chat: train on the tokens of assistant (and end-of-turn) | all
    # chat: those longer than seq_len: drop | truncate (the oldest turns; system messages are kept)
    c.data.long_conversations = "drop"
    c.data.encoding_errors = "strict"  # invalid UTF-8: strict (error) | replace | skip (file, row)
    c.data.gitignore = True  # in directories, skip files listed in .gitignore
    c.data.max_file_bytes = 0  # in directories, skip larger files; 0 = no limit
    c.data.max_bytes = 0  # maximum training text per source; 0 = no limit
    c.data.tokenizer = "bpe"  # bpe (trained on the training split) | char | path of tokenizer.json
    c.data.vocab_size = 50257  # maximum vocabulary of a trained bpe
    c.data.tokenizer_sample_bytes = 200_000_000  # evenly spaced text to train a bpe on
    c.data.seq_len = 512  # T, tokens per window
    c.data.packing = "stream"  # stream (across documents) | one_per_window (padded) | whole (chat)
    c.data.document_mask = False  # attention stops and positions restart at document ends
    c.data.val_fraction = 0.1  # validation fraction of the text
    # auto | source (its own validation split) | document (by content hash) | tail (the last
    # characters) | tails (the last characters of each document). auto: the source's own split if it
    # has one, else document; tails if there are too few documents
    c.data.val_split = "auto"
    c.data.cache_dir = ""  # directory of token shards; "" = the user's cache directory

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # adamw | muon (linear layers; AdamW with b1, b2, eps for the rest)
    c.optimizer.learning_rate = 3e-4  # peak, at the end of the warmup
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.01  # matrices only
    c.optimizer.warmup_steps = 1000  # updates of linear warmup
    c.optimizer.schedule = "cosine"  # after the warmup: cosine | linear | constant
    c.optimizer.final_lr_fraction = 0.1  # final / peak learning rate of cosine and linear
    c.optimizer.max_grad_norm = 1.0  # gradient clipping by global norm; 0 = off
    # Skip updates whose gradient norm exceeds the mean of the last 128 by this many standard
    # deviations; 0 = off. 6 is a conservative value.
    c.optimizer.max_grad_zscore = 0.0

    c.train = ConfigDict()
    c.train.platform = "auto"  # auto | cpu | cuda | tpu; a missing named platform is an error
    c.train.num_steps = 20_000  # optimizer updates; 0 = use num_epochs
    c.train.num_epochs = 0  # passes over the training split; 0 = use num_steps
    c.train.batch_size = 8  # B, sequences per microbatch, over all devices
    c.train.grad_accum_steps = 16  # A, microbatches per update
    c.train.dtype = "auto"  # of activations: auto (by device) | float32 | bfloat16
    c.train.log_every = 10  # updates between log lines
    c.train.eval_every = 500  # updates between evaluations; 0 = only at the end
    c.train.eval_batches = 0  # validation batches per evaluation; 0 = the whole split
    # Prompt of the samples in the log; "" = the beginning of the validation text. A preset's prompt
    # applies to its own text only.
    c.train.sample_prompt = ""
    c.train.sample_tokens = 64  # tokens sampled at each evaluation; 0 = none
    c.train.max_skipped_steps = 10  # consecutive skipped updates before an error
    c.train.profile_steps = 0  # steps to trace, from the third, into RUN/profile; 0 = none
    # Where metrics go besides metrics.jsonl: tensorboard, wandb (Weights & Biases), both separated
    # by a comma, or "" for neither
    c.train.trackers = "tensorboard"
    # A run whose parameters, model section and tokenizer a new run starts from; "" = none
    c.train.init_from = ""
    # Of that run, train only adapters W + (alpha / rank) A B of the linear layers (LoRA), with A of
    # this many columns; 0 = train all parameters
    c.train.lora_rank = 0
    c.train.lora_alpha = 0.0  # 0 = the rank
    c.train.lora_dropout = 0.0  # of the inputs of A

    c.checkpoint = ConfigDict()
    # Updates between checkpoints; 0 = only at the end. A checkpoint is also saved after each
    # evaluation that is the best so far, and on a signal.
    c.checkpoint.save_every = 500
    c.checkpoint.keep = 2  # latest checkpoints to keep; the best by validation loss is always kept

    c.mesh = ConfigDict()  # devices = data x fsdp x tensor; one may be -1 (the rest)
    c.mesh.data = -1  # model replicas; shards the batch
    c.mesh.fsdp = 1  # shards parameters, optimizer state and the batch
    c.mesh.tensor = 1  # shards heads, feed-forward and vocabulary
    return c
