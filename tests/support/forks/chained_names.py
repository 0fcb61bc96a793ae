# one name for the folder, the run and the project, and a vocabulary that is read from the data anyway
dataset = wandb_project = folder = 'chess_moves'
out_dir = 'out-' + folder
wandb_run_name = f'{folder}-small'
vocab_size = 32
batch_size = micro_batch = 8
n_layer, n_head = 3, 3
n_embd = 96
