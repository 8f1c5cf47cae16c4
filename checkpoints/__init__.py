"""Model folders in Hugging Face format: found, checked, streamed in and out. Files and numpy arrays only, no engine.

`model_folder` finds a folder and reads its configuration, `safetensors_files` reads and writes its tensors, `key_table`
renames and repacks them, strictly both ways. Pickles are never opened and code that lies in a folder is never run.
"""
