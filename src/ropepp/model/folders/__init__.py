"""Models in from folders of config.json and safetensors: `published` reads what they describe,
`tensors` their files. The one room of the model that needs more than torch.
"""
