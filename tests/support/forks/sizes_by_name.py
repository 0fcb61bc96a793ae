# a table of sizes, of which one is taken by loops and conditions at the top level
size = 'tiny'
sizes = {'tiny': (2, 2, 64), 'small': (6, 6, 384)}
for name, values in sizes.items():
    if name == size:
        n_layer, n_head, n_embd = values
if n_embd < 128:
    dropout = 0
    wandb_log = False
else:
    dropout = 0.2
while n_embd % n_head:
    n_embd += 1
try:
    import not_installed_anywhere
except ImportError:
    not_installed_anywhere = None
