"""The SheepOp base model, and the one place where every field and its default stand.

Runs anywhere: without a path or a name it trains on Python's own standard library. Every other
file in this folder is `base` and its differences; any field can also be set on the command line:
`--config.section.field=value`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """44.6M parameters at a vocabulary of 50257, for one GPU."""
    c = ConfigDict()
    c.seed = 42  # initial weights, data order, dropout

    c.model = ConfigDict()
    c.model.d_model = 512  # width of the residual stream
    c.model.num_layers = 6
    c.model.num_heads = 8
    c.model.num_kv_heads = 0  # key/value heads for grouped-query attention; 0 = num_heads
    c.model.d_ff = 2048  # width of the feed-forward layer
    c.model.max_seq_len = 512  # longest context in tokens
    c.model.dropout = 0.1  # on the embedding and on each sublayer's output
    c.model.attention_dropout = 0.0  # on attention weights; above 0 rules out cuDNN attention
    c.model.activation = "gelu"  # gelu (exact) | gelu_tanh | relu
    c.model.position = "rope"  # rope | sinusoidal | learned
    c.model.rope_theta = 10000.0  # base of RoPE's wavelengths
    c.model.norm_eps = 1e-5  # added to LayerNorm's variance
    c.model.use_bias = False  # biases in the linear layers (LayerNorm always has its own)
    c.model.tie_embeddings = True  # output layer = token embedding
    # What the backward pass computes again: none | dots (all but the products with matrices: about
    # half the memory for a few percent of time) | full (each block: a third more time)
    c.model.remat = "none"

    c.data = ConfigDict()
    # auto (path by its suffix, else name, else stdlib) | files | json | csv | parquet | hub | pdf
    # | sql | stdlib
    c.data.source = "auto"
    c.data.path = ""  # a file, a directory, a glob, a URL of a table, or several, by commas
    c.data.val_path = ""  # held-out text, read as path is; "" = a share of the text is held out
    c.data.name = ""  # a dataset on the Hugging Face hub, or a directory with a copy of one
    c.data.subset = ""  # its configuration, e.g. "wikitext-103-raw-v1"
    c.data.text_column = "text"  # json, csv, parquet, hub, sql: the column that holds the text
    c.data.join_rows = False  # rows are lines of one text rather than each a document
    c.data.query = ""  # sql: a SELECT; path is then a SQLite file or postgresql://user@host/db
    c.data.mixture = ConfigDict()  # several sources by weight: see configs/mixture.py
    c.data.encoding_errors = "strict"  # not UTF-8: strict (an error) | replace | skip (the file)
    c.data.gitignore = True  # in a directory, pass over what its .gitignore files name
    c.data.max_file_bytes = 0  # in a directory, pass over larger files; 0 = no limit
    c.data.max_bytes = 0  # stop reading a source after so much text to train on; 0 = no limit
    c.data.tokenizer = "bpe"  # bpe (trained on the training split) | char | path to tokenizer.json
    c.data.vocab_size = 50257  # at most this many tokens when training a bpe
    c.data.tokenizer_sample_bytes = (
        200_000_000  # training text, evenly spread, that a bpe learns from
    )
    c.data.seq_len = 512  # T, tokens in one window
    c.data.packing = "stream"  # windows across documents | one_per_window (padded)
    c.data.document_mask = False  # attention and positions stop at documents' borders
    c.data.val_fraction = 0.1  # held-out share
    # auto | source (its own validation split) | document (by a hash of its content) | tail (by
    # characters). auto: the source's own if it has one, else document, else tail
    c.data.val_split = "auto"
    c.data.cache_dir = ""  # where token shards are kept; "" = the user's cache directory

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # adamw | muon (linear layers by Muon; b1, b2, eps serve the rest)
    c.optimizer.learning_rate = 3e-4  # at the end of the warmup
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.01  # on matrices only
    c.optimizer.warmup_steps = 1000  # updates of linear warmup
    c.optimizer.schedule = "cosine"  # after the warmup: cosine | linear | constant
    c.optimizer.final_lr_fraction = 0.1  # where cosine and linear end, as a share of learning_rate
    c.optimizer.max_grad_norm = 1.0  # clip by global norm; 0 = off
    # Leave out updates whose gradient norm is so many standard deviations above the mean of the
    # last 128; 0 = off. 6 is a cautious value.
    c.optimizer.max_grad_zscore = 0.0

    c.train = ConfigDict()
    c.train.platform = "auto"  # auto | cpu | cuda | tpu; a named one that is missing is an error
    c.train.num_steps = 20_000  # optimizer updates; 0 = by num_epochs
    c.train.num_epochs = 0  # passes over the training split; 0 = by num_steps
    c.train.batch_size = 8  # B, sequences in one microbatch, over all devices
    c.train.grad_accum_steps = 16  # A, microbatches in one update
    c.train.dtype = "auto"  # of activations: auto (by the device) | float32 | bfloat16
    c.train.log_every = 10  # updates between lines of metrics
    c.train.eval_every = 500  # updates between evaluations; 0 = only at the end
    c.train.eval_batches = 0  # held-out batches in one evaluation; 0 = the whole split
    c.train.sample_prompt = ""  # text that the samples in the log go on from
    c.train.sample_tokens = 64  # tokens sampled to the log at each evaluation; 0 = none
    c.train.max_skipped_steps = 10  # skipped updates in a row before an error
    c.train.profile_steps = 0  # steps traced, from the third on, to RUN/profile; 0 = none

    c.checkpoint = ConfigDict()
    # Updates between checkpoints; 0 = only at the end. One is also saved after each evaluation that
    # is the best so far, and on a signal.
    c.checkpoint.save_every = 500
    c.checkpoint.keep = 2  # latest checkpoints kept; the best by validation loss always is

    c.mesh = ConfigDict()  # devices = data x fsdp x tensor; one may be -1: what is left
    c.mesh.data = -1  # copies of the model, each with its share of the batch
    c.mesh.fsdp = 1  # shards of parameters and optimizer state, each with its share of the batch
    c.mesh.tensor = 1  # shards of heads, feed-forward and vocabulary
    return c
