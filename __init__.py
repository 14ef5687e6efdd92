"""ComfyUI nodes that patch a MODEL so that the images it generates show a given subject."""

from comfy_api.latest import ComfyExtension, io

WEB_DIRECTORY = "./web"


class SubjectPatches(ComfyExtension):
    """The pack as the host sees it."""

    async def on_load(self) -> None:
        """Makes the host know the toys, the example pictures, and its folders for the pack's files."""
        from .nodes.model_files import register_folders
        from .nodes.shipped_files import register_shipped_files
        from .toy import dit_family, family

        family.register()
        dit_family.register()
        register_shipped_files()
        register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node of the pack."""
        from .nodes.align import AlignReferenceNode
        from .nodes.anystory import AnyStoryNode
        from .nodes.anystory_subject import AnyStorySubjectNode, LoadAnyStoryNode
        from .nodes.attention_inspector import AttentionInspectorNode, RecordAttentionNode
        from .nodes.auxiliary_prompt import AuxiliaryPromptNode
        from .nodes.dual_branch import DualBranchIntegrationNode
        from .nodes.encode_prompt import EncodePromptWithSubjects
        from .nodes.image_prompt import EncodeImagePromptNode, LoadImagePromptAdapterNode
        from .nodes.layout import LayoutBiasNode, LayoutNode
        from .nodes.recycled_attention import RecycledSelfAttentionNode
        from .nodes.residual import ApplyResidualTokens, LoadResidualToken, SaveResidualToken
        from .nodes.retouch import AdaptiveBlendMaskNode, MultiSourceSwapNode
        from .nodes.routed_reference import RoutedReferenceAttentionNode, SubjectShareNode
        from .nodes.router import RouteByAttentionNode, RouteByEncoderNode, RouteByMasksNode
        from .nodes.self_recurrence import SelfRecurrenceNode
        from .nodes.semantic_injection import LoadSemanticInjectionNode, SemanticInjectionNode
        from .nodes.step_blended_guider import StepBlendedGuiderNode
        from .nodes.subject import SubjectNode
        from .nodes.subject_encoder import EncodeSubjectsNode, LoadSubjectEncoderNode
        from .nodes.train_concept import TrainConceptNode
        from .nodes.train_residual import TrainResidualToken
        from .nodes.trajectory import InvertToTrajectoryNode
        from .nodes.trajectory_files import LoadTrajectoryNode, SaveTrajectoryNode

        return [
            SubjectNode,
            EncodePromptWithSubjects,
            RecycledSelfAttentionNode,
            LoadSemanticInjectionNode,
            SemanticInjectionNode,
            RecordAttentionNode,
            AttentionInspectorNode,
            LayoutNode,
            LayoutBiasNode,
            SelfRecurrenceNode,
            ApplyResidualTokens,
            TrainResidualToken,
            SaveResidualToken,
            LoadResidualToken,
            SubjectShareNode,
            LoadImagePromptAdapterNode,
            EncodeImagePromptNode,
            LoadSubjectEncoderNode,
            EncodeSubjectsNode,
            RouteByMasksNode,
            RouteByAttentionNode,
            RouteByEncoderNode,
            RoutedReferenceAttentionNode,
            LoadAnyStoryNode,
            AnyStorySubjectNode,
            AnyStoryNode,
            StepBlendedGuiderNode,
            InvertToTrajectoryNode,
            AlignReferenceNode,
            SaveTrajectoryNode,
            LoadTrajectoryNode,
            MultiSourceSwapNode,
            AdaptiveBlendMaskNode,
            AuxiliaryPromptNode,
            DualBranchIntegrationNode,
            TrainConceptNode,
        ]


async def comfy_entrypoint() -> ComfyExtension:
    """What the host calls to load the pack."""
    return SubjectPatches()
