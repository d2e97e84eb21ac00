"""From raw text to batches of token ids; the rooms in the order in which data flows:

1. `text`: raw files in, documents out, with what had to be left out;
2. `tokenizer`: documents to ids and back; `tokens`: ids on disk, memory-mapped: a corpus of shards;
3. `prepare`: the command that leads from 1 to 2, in many processes, and goes on where it was
   killed;
4. `packing`: which documents, or pieces of them, share a row of T + 1 tokens;
5. `loading`: which rows make a step, for every process, with one integer as the whole state.

`recall` is another source of rows: a synthetic task without any text.
"""
