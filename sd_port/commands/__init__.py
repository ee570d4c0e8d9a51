"""The commands of sd-edit: files and options in, pictures and the JSON that repeats them out."""
