"""Attention as the formula says it."""

import torch

from ropepp.model.kernels.backend import Backend, Request, Result


def reference(request: Request) -> Result:
    """The definition, float32, all scores in memory: every other backend must agree with it."""
    q, k, v = (x.float() for x in (request.q, request.k, request.v))
    if request.documents is not None:
        q, k, v = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))
    T, S, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(G, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * request.scale
    # Which key, counted over all keys, a query's own token is.
    query, key = torch.arange(S - T, S, device=q.device), torch.arange(S, device=q.device)
    hidden = torch.zeros(T, S, dtype=torch.bool, device=q.device)
    if request.documents is not None and request.documents_k is not None:
        both = request.documents, request.documents_k
        ends, ends_k = (own.boundaries[1:].long() for own in both)
        index = torch.arange(T, device=q.device)
        document = torch.bucketize(index, ends, right=True)
        document_k = torch.bucketize(key, ends_k, right=True)
        query = index - ends[document] + ends_k[document]
        hidden = document[:, None] != document_k[None, :]
    distance = query[:, None] - key[None, :]
    if request.alibi_slopes is not None:
        scores = scores - request.alibi_slopes.float()[:, None, None] * distance.abs()
    if request.causal:
        hidden = hidden | (distance < 0)
    if request.document_ids is not None:
        own, others = request.document_ids
        hidden = hidden | (own[:, None, :, None] != others[:, None, None, :])
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    out = torch.einsum("bhts,bshd->bthd", weights, v)
    return out.reshape(request.q.shape).to(request.q.dtype), None


REFERENCE = Backend("reference", lambda request: None, reference)
