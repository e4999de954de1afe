"""`finetune CONFIG`: supervised training of a pretrained encoder on labelled shards."""
