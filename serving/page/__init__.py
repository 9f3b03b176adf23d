"""The web page of a server: drawing, talking about pictures, a gallery, the models and their figures (extra ui).

It is made of Gradio's parts, and knows models by a `Backend` alone: the server that it is mounted in, or another one.
"""
