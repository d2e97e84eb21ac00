"""Models in from folders of config.json and safetensors: `hub` brings those that have a name there,
`published` reads what they describe, `tensors` their files. The one room of the model that needs
more than torch.
"""
