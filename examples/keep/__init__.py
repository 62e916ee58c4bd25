"""What a model keeps of a document: the text, a state, an adapter, or both; see README.md."""

from refine_verl.command.quiet import quieten_third_parties

quieten_third_parties()
