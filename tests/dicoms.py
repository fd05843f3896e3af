"""DICOM files for tests: valid CT, MR and PET series, one file a slice, and enhanced multi-frame CT and MR.

The world here is LPS millimetres, as in DICOM; ``affine_of`` alone gives RAS+.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLSLossless,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    RLELossless,
    generate_uid,
)
from pydicom.valuerep import DS

Vector = Sequence[float]
Change = Callable[[Dataset, int], object]

CLASSIC = {"CT": CTImageStorage, "MR": MRImageStorage, "PT": PositronEmissionTomographyImageStorage}
ENHANCED = {"CT": EnhancedCTImageStorage, "MR": EnhancedMRImageStorage}
ENCODERS: dict[str, Callable[[NDArray[Any]], bytes]] = {
    JPEGLossless: lambda frame: imagecodecs.ljpeg_encode(_unsigned(frame)),
    JPEGLSLossless: lambda frame: imagecodecs.jpegls_encode(_unsigned(frame)),
    JPEG2000Lossless: lambda frame: imagecodecs.jpeg2k_encode(frame, level=0, reversible=True, codecformat="j2k"),
    HTJ2KLossless: lambda frame: imagecodecs.htj2k_encode(frame, reversible=True),
}
MARKED = """
    AccessionNumber AdditionalPatientHistory AcquisitionDeviceProcessingDescription CurrentPatientLocation
    DerivationDescription DeviceSerialNumber EthnicGroup ImageComments InstitutionAddress InstitutionName
    InstitutionalDepartmentName IssuerOfPatientID Manufacturer ManufacturerModelName MedicalAlerts
    NameOfPhysiciansReadingStudy Occupation OperatorsName OtherPatientNames PatientAddress PatientBirthName
    PatientComments PatientID PatientMotherBirthName PatientName PatientTelephoneNumbers
    PerformedProcedureStepDescription PerformedProcedureStepID PerformingPhysicianName PhysiciansOfRecord
    PositionReferenceIndicator ProtocolName ReferringPhysicianName RequestingPhysician SeriesDescription
    SoftwareVersions StationName StudyDescription StudyID
"""
"""Keywords of names, ids and free text."""


@dataclass(frozen=True)
class Grid:
    """Where the voxels of an array (I, J, K) lie.

    Attributes:
        spacing: distance of voxel centres along I, J, K, mm.
        row: unit vector along I, LPS.
        column: unit vector along J, LPS.
        origin: centre of voxel (0, 0, 0), LPS mm.
        step: vector from a slice to the next, LPS mm; normal times ``spacing[2]`` unless given.
        offsets: where the slices lie along the direction of ``step``, mm from ``origin``; even unless given.
    """

    spacing: Vector = (1.0, 1.0, 1.0)
    row: Vector = (1, 0, 0)
    column: Vector = (0, 1, 0)
    origin: Vector = (0, 0, 0)
    step: Vector | None = None
    offsets: Sequence[float] | None = None

    def places(self, count: int) -> list[NDArray[np.float64]]:
        """The first voxels of slices, LPS mm."""
        normal = np.cross(self.row, self.column) * self.spacing[2]
        along = normal if self.step is None else np.array(self.step, dtype=float)
        if self.offsets is None:
            return [np.array(self.origin) + k * along for k in range(count)]
        unit = along / np.linalg.norm(along)
        return [np.array(self.origin) + offset * unit for offset in list(self.offsets)[:count]]


def write_series(
    folder: Path,
    array: NDArray[Any],
    *,
    modality: str = "CT",
    slope: float | Sequence[float] = 1,
    intercept: float | Sequence[float] = 0,
    syntax: str = ExplicitVRLittleEndian,
    uid: str | None = None,
    study_uid: str | None = None,
    marker: str = "",
    change: Change | None = None,
    **grid: Any,
) -> list[Path]:
    """Write a series of one file a slice; neither file names nor InstanceNumbers follow the position.

    Args:
        folder: where to; made where it is missing.
        array: stored values (I, J, K) of 8, 16 or 32 bits, I along ``row``, J along ``column``.
        modality: CT, MR or PT.
        slope: of rescaling; one, or one a slice.
        intercept: likewise.
        syntax: UID of the transfer syntax: native ones, deflated, RLE, and those of ``ENCODERS``.
        uid: of the series.
        study_uid: of the study.
        marker: text, 16 characters at most, for every name, id and free-text field.
        change: called with every data set, as it will be saved, and its k.
        grid: what ``Grid`` takes.

    Returns:
        The files, in the order of the slices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = array.shape[2]
    lying = Grid(**grid)
    places = lying.places(count)
    shared = (uid or generate_uid(), study_uid or generate_uid(), generate_uid())
    numbers = np.random.default_rng(count).permutation(count) + 1
    slopes, intercepts = np.broadcast_to(slope, count), np.broadcast_to(intercept, count)
    paths = []
    for k in range(count):
        dataset = _composite(CLASSIC[modality], modality, shared, int(numbers[k]), marker)
        _plane(dataset, lying, places[k])
        _CLASSIC_MODULES[modality](dataset, count, k)
        if modality != "MR" or slopes[k] != 1 or intercepts[k] != 0:
            dataset.RescaleSlope, dataset.RescaleIntercept = _ds(slopes[k]), _ds(intercepts[k])
        _pixels(dataset, array[:, :, k : k + 1], syntax)
        if change is not None:
            change(dataset, k)
        paths.append(_saved(dataset, folder / f"im{(numbers[k] * 7919) % 10007:05d}.dcm"))
    return paths


def write_enhanced(
    folder: Path,
    array: NDArray[Any],
    *,
    modality: str = "MR",
    slope: float | Sequence[float] = 1,
    intercept: float | Sequence[float] = 0,
    syntax: str = ExplicitVRLittleEndian,
    uid: str | None = None,
    study_uid: str | None = None,
    marker: str = "",
    change: Change | None = None,
    **grid: Any,
) -> Path:
    """Write one enhanced multi-frame file, its frames out of order; ``change`` gets the whole data set and 0.

    The other arguments are those of ``write_series``; ``modality`` is MR or CT.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = array.shape[2]
    lying = Grid(**grid)
    places = lying.places(count)
    shared = (uid or generate_uid(), study_uid or generate_uid(), generate_uid())
    slopes, intercepts = np.broadcast_to(slope, count), np.broadcast_to(intercept, count)
    dataset = _composite(ENHANCED[modality], modality, shared, 1, marker)
    _enhanced(dataset, count)
    shared_groups, frames = Dataset(), []
    shared_groups.PixelMeasuresSequence = [_item(_pixel_measures, lying.spacing)]
    shared_groups.PlaneOrientationSequence = [_item(_orientation, lying.row, lying.column)]
    order = np.random.default_rng(count).permutation(count)
    for k in order:
        frame = Dataset()
        frame.PlanePositionSequence = [_item(_position, places[k])]
        content = Dataset()
        content.FrameAcquisitionDateTime = content.FrameReferenceDateTime = "20240102030405"
        content.FrameAcquisitionDuration = 1.0
        content.FrameAcquisitionNumber = 1
        content.StackID, content.InStackPositionNumber = "1", int(k) + 1
        content.DimensionIndexValues = [1, int(k) + 1]
        frame.FrameContentSequence = [content]
        values = Dataset()
        values.RescaleIntercept, values.RescaleSlope = _ds(intercepts[k]), _ds(slopes[k])
        values.RescaleType = "HU" if modality == "CT" else "US"
        frame.PixelValueTransformationSequence = [values]
        frames.append(frame)
    _ENHANCED_MODULES[modality](dataset, shared_groups)
    dataset.SharedFunctionalGroupsSequence = [shared_groups]
    dataset.PerFrameFunctionalGroupsSequence = frames
    _pixels(dataset, array[:, :, order], syntax)
    if change is not None:
        change(dataset, 0)
    return _saved(dataset, folder / "enhanced.dcm")


def affine_of(**grid: Any) -> NDArray[np.float64]:
    """RAS+ affine of the array that was written on a ``Grid``, index to world mm; with offsets, from the first two.

    A reader that lays slices along their normal turns the array where ``step`` points against it: compare worlds.
    """
    lying = Grid(**grid)
    first, second = lying.places(2)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = np.array(lying.row) * lying.spacing[0], np.array(lying.column) * lying.spacing[1]
    affine[:3, 2], affine[:3, 3] = second - first, first
    affine[:2] *= -1
    return affine


def _composite(sop_class: UID, modality: str, shared: tuple[str, str, str], number: int, marker: str) -> Dataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, generate_uid()
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID, dataset.FrameOfReferenceUID = shared
    for keyword in ("PatientBirthDate", "PatientSex", "PatientName", "PatientID", "StudyID", "AccessionNumber"):
        setattr(dataset, keyword, "")
    for keyword in ("ReferringPhysicianName", "PositionReferenceIndicator", "Manufacturer", "Laterality"):
        setattr(dataset, keyword, "")
    dataset.StudyDate = dataset.SeriesDate = dataset.ContentDate = dataset.AcquisitionDate = "20240102"
    dataset.StudyTime = dataset.SeriesTime = dataset.ContentTime = dataset.AcquisitionTime = "030405"
    dataset.Modality, dataset.SeriesNumber, dataset.AcquisitionNumber = modality, 1, 1
    dataset.InstanceNumber, dataset.PatientPosition = number, "HFS"
    if marker:
        for keyword in MARKED.split():
            setattr(dataset, keyword, marker)
        dataset.private_block(0x0029, "TESTS", create=True).add_new(0x01, "LO", marker)
    return dataset


def _plane(dataset: Dataset, lying: Grid, place: NDArray[np.float64]) -> None:
    _pixel_measures(dataset, lying.spacing)
    if "SpacingBetweenSlices" in dataset and dataset.Modality != "MR":  # an attribute of MR alone, C.8.3.1
        del dataset.SpacingBetweenSlices
    _orientation(dataset, lying.row, lying.column)
    _position(dataset, place)


def _pixel_measures(dataset: Dataset, spacing: Vector) -> None:
    dataset.PixelSpacing = [_ds(spacing[1]), _ds(spacing[0])]  # between rows first: PS3.3 10.7.1.3
    dataset.SliceThickness = dataset.SpacingBetweenSlices = _ds(spacing[2])


def _orientation(dataset: Dataset, row: Vector, column: Vector) -> None:
    dataset.ImageOrientationPatient = [_ds(v) for v in (*row, *column)]


def _position(dataset: Dataset, place: NDArray[np.float64]) -> None:
    dataset.ImagePositionPatient = [_ds(v) for v in place]


def _item(fill: Callable[..., None], *arguments: object) -> Dataset:
    item = Dataset()
    fill(item, *arguments)
    return item


def _unsigned(frame: NDArray[Any]) -> NDArray[Any]:
    return frame.view(frame.dtype.str.replace("i", "u"))


def _ds(value: object) -> DS:
    return DS(float(value), auto_format=True)  # type: ignore[arg-type]


def _ct(dataset: Dataset, count: int, k: int) -> None:
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.KVP, dataset.RescaleType = "120", "HU"


def _mr(dataset: Dataset, count: int, k: int) -> None:
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = "SE", "NONE", ""
    dataset.MRAcquisitionType, dataset.RepetitionTime, dataset.EchoTime = "2D", "500", "10"
    dataset.EchoTrainLength = "1"


def _pt(dataset: Dataset, count: int, k: int) -> None:
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.Units, dataset.CountsSource, dataset.SeriesType = "BQML", "EMISSION", ["WHOLE BODY", "IMAGE"]
    dataset.NumberOfSlices, dataset.CorrectedImage, dataset.DecayCorrection = count, ["DECY"], "NONE"
    dataset.CollimatorType, dataset.ActualFrameDuration, dataset.ImageIndex = "NONE", "1000", k + 1
    dataset.FrameReferenceTime = "0"
    dataset.PatientOrientationCodeSequence = [_code("102538003", "SCT", "recumbent")]
    del dataset.PatientPosition  # C.7.3.1.1.2: the codes stand in its place
    dataset.PatientGantryRelationshipCodeSequence = [_code("102540008", "SCT", "headfirst")]
    dataset.RadiopharmaceuticalInformationSequence = [Dataset()]
    dataset.RadiopharmaceuticalInformationSequence[0].RadionuclideCodeSequence = []


_CLASSIC_MODULES: dict[str, Callable[[Dataset, int, int], None]] = {"CT": _ct, "MR": _mr, "PT": _pt}


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _enhanced(dataset: Dataset, count: int) -> None:
    """The modules of the whole file that enhanced CT and MR share (PS3.3 A.36, A.38)."""
    del dataset.AcquisitionNumber, dataset.Laterality
    for keyword in ("Manufacturer", "ManufacturerModelName", "DeviceSerialNumber", "SoftwareVersions"):
        if not dataset.get(keyword):
            setattr(dataset, keyword, "medseg tests")  # not to be empty here: C.7.5.2
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    dataset.NumberOfFrames = count
    dataset.AcquisitionDateTime, dataset.AcquisitionDuration = "20240102030405", 1.0
    dataset.ContentQualification, dataset.PixelPresentation = "RESEARCH", "MONOCHROME"
    dataset.VolumetricProperties, dataset.VolumeBasedCalculationTechnique = "VOLUME", "NONE"
    dataset.BurnedInAnnotation, dataset.LossyImageCompression = "NO", "00"
    dataset.PresentationLUTShape = "IDENTITY"
    dataset.AcquisitionContextSequence = []
    organisation = Dataset()
    organisation.DimensionOrganizationUID = generate_uid()
    dataset.DimensionOrganizationSequence = [organisation]
    dataset.DimensionIndexSequence = []
    for pointer in (0x00209056, 0x00209057):  # StackID, InStackPositionNumber
        index = Dataset()
        index.DimensionOrganizationUID = organisation.DimensionOrganizationUID
        index.DimensionIndexPointer, index.FunctionalGroupPointer = pointer, 0x00209111
        dataset.DimensionIndexSequence.append(index)


def _anatomy(groups: Dataset) -> None:
    anatomy = Dataset()
    anatomy.AnatomicRegionSequence = [_code("69536005", "SCT", "Head")]
    anatomy.FrameLaterality = "U"
    groups.FrameAnatomySequence = [anatomy]
    view = Dataset()
    view.WindowCenter, view.WindowWidth = "100", "200"
    groups.FrameVOILUTSequence = [view]


def _frame_type(keyword: str, groups: Dataset) -> None:
    kind = Dataset()
    kind.FrameType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    kind.PixelPresentation, kind.VolumetricProperties = "MONOCHROME", "VOLUME"
    kind.VolumeBasedCalculationTechnique = "NONE"
    if keyword == "MRImageFrameTypeSequence":
        kind.ComplexImageComponent, kind.AcquisitionContrast = "MAGNITUDE", "T1"
    setattr(groups, keyword, [kind])


def _enhanced_ct(dataset: Dataset, groups: Dataset) -> None:
    _anatomy(groups)
    _frame_type("CTImageFrameTypeSequence", groups)
    for keyword, values in _CT_GROUPS.items():
        setattr(groups, keyword, [_of(values)])


def _enhanced_mr(dataset: Dataset, groups: Dataset) -> None:
    dataset.ComplexImageComponent, dataset.AcquisitionContrast = "MAGNITUDE", "T1"
    dataset.ResonantNucleus, dataset.MagneticFieldStrength, dataset.KSpaceFiltering = "1H", 1.5, "NONE"
    dataset.ApplicableSafetyStandardAgency = "IEC"
    for keyword, value in _MR_PULSE.items():
        setattr(dataset, keyword, value)
    _anatomy(groups)
    _frame_type("MRImageFrameTypeSequence", groups)
    for keyword, values in _MR_GROUPS.items():
        setattr(groups, keyword, [_of(values)])


def _of(values: dict[str, Any]) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, [_of(v) for v in value] if keyword.endswith("Sequence") else value)
    return item


_CT_GROUPS: dict[str, dict[str, Any]] = {
    "IrradiationEventIdentificationSequence": {"IrradiationEventUID": "1.2.3.4"},
    "CTAcquisitionTypeSequence": {
        "AcquisitionType": "SEQUENCED",
        "ConstantVolumeFlag": "NO",
        "FluoroscopyFlag": "NO",
    },
    "CTAcquisitionDetailsSequence": {
        "RotationDirection": "CW",
        "RevolutionTime": 1.0,
        "SingleCollimationWidth": 1.0,
        "TotalCollimationWidth": 1.0,
        "TableHeight": 0.0,
        "GantryDetectorTilt": 0.0,
        "DataCollectionDiameter": 500.0,
    },
    "CTTableDynamicsSequence": {"TableSpeed": 1.0},
    "CTPositionSequence": {
        "TablePosition": 0.0,
        "DataCollectionCenterPatient": [0.0] * 3,
        "ReconstructionTargetCenterPatient": [0.0] * 3,
    },
    "CTGeometrySequence": {"DistanceSourceToDetector": 1000.0, "DistanceSourceToDataCollectionCenter": 500.0},
    "CTReconstructionSequence": {
        "ConvolutionKernelGroup": "SOFT_TISSUE",
        "ConvolutionKernel": "SOFT",
        "ReconstructionFieldOfView": [500.0, 500.0],
        "ReconstructionPixelSpacing": [1.0, 1.0],
        "ImageFilter": "NONE",
        "ReconstructionAlgorithm": "FILTER_BACK_PROJ",
        "ReconstructionAngle": 360.0,
    },
    "CTExposureSequence": {
        "ExposureTimeInms": 1.0,
        "XRayTubeCurrentInmA": 1.0,
        "ExposureInmAs": 1.0,
        "ExposureModulationType": "NONE",
    },
    "CTXRayDetailsSequence": {"KVP": 120.0, "FocalSpots": 1.0, "FilterType": "NONE", "FilterMaterial": "MIXED"},
}
_MR_PULSE = {
    "MRAcquisitionType": "2D",
    "PulseSequenceName": "SE",
    "EchoPulseSequence": "SPIN",
    "MultipleSpinEcho": "NO",
    "MultiPlanarExcitation": "NO",
    "PhaseContrast": "NO",
    "TimeOfFlightContrast": "NO",
    "SteadyStatePulseSequence": "NONE",
    "EchoPlanarPulseSequence": "NO",
    "SaturationRecovery": "NO",
    "SpectrallySelectedSuppression": "NONE",
    "OversamplingPhase": "NONE",
    "GeometryOfKSpaceTraversal": "RECTILINEAR",
    "SegmentedKSpaceTraversal": "SINGLE",
    "RectilinearPhaseEncodeReordering": "LINEAR",
    "NumberOfKSpaceTrajectories": 1,
}
_MR_GROUPS: dict[str, dict[str, Any]] = {
    "MRTimingAndRelatedParametersSequence": {
        "RepetitionTime": 500.0,
        "FlipAngle": 90.0,
        "EchoTrainLength": 1,
        "RFEchoTrainLength": 1,
        "GradientEchoTrainLength": 0,
        "GradientOutputType": "DB_DT",
        "GradientOutput": 1.0,
        "SpecificAbsorptionRateSequence": [
            {"SpecificAbsorptionRateDefinition": "IEC_WHOLE_BODY", "SpecificAbsorptionRateValue": 1.0}
        ],
        "OperatingModeSequence": [{"OperatingModeType": "STATIC FIELD", "OperatingMode": "IEC_NORMAL"}],
    },
    "MREchoSequence": {"EffectiveEchoTime": 10.0},
    "MRModifierSequence": {
        "InversionRecovery": "NO",
        "FlowCompensation": "NONE",
        "Spoiling": "NONE",
        "T2Preparation": "NO",
        "SpectrallySelectedExcitation": "NONE",
        "SpatialPresaturation": "NONE",
        "PartialFourier": "NO",
        "ParallelAcquisition": "NO",
    },
    "MRImagingModifierSequence": {
        "MagnetizationTransfer": "NONE",
        "BloodSignalNulling": "NO",
        "Tagging": "NONE",
        "TransmitterFrequency": 63.8,
        "PixelBandwidth": 100.0,
    },
    "MRReceiveCoilSequence": {
        "ReceiveCoilName": "BODY",
        "ReceiveCoilManufacturerName": "",
        "ReceiveCoilType": "BODY",
        "QuadratureReceiveCoil": "YES",
    },
    "MRTransmitCoilSequence": {
        "TransmitCoilName": "BODY",
        "TransmitCoilManufacturerName": "",
        "TransmitCoilType": "BODY",
    },
    "MRAveragesSequence": {"NumberOfAverages": 1.0},
    "MRFOVGeometrySequence": {
        "InPlanePhaseEncodingDirection": "ROW",
        "MRAcquisitionFrequencyEncodingSteps": 10,
        "MRAcquisitionPhaseEncodingStepsInPlane": 10,
        "PercentSampling": 100.0,
        "PercentPhaseFieldOfView": 100.0,
    },
}
_ENHANCED_MODULES: dict[str, Callable[[Dataset, Dataset], None]] = {"CT": _enhanced_ct, "MR": _enhanced_mr}


def _pixels(dataset: Dataset, array: NDArray[Any], syntax: str) -> None:
    """Put the frames (I, J, K) into a data set, compressed where the syntax says so."""
    frames = np.ascontiguousarray(array.transpose(2, 1, 0))
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = frames.shape[1:]
    dataset.BitsAllocated = dataset.BitsStored = 8 * frames.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(frames.dtype.kind == "i")
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    data = frames.astype(frames.dtype.newbyteorder(order)).tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OB" if frames.itemsize == 1 else "OW"
    if UID(syntax).is_compressed and not UID(syntax).is_deflated:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        _compress(dataset, frames, syntax)
    dataset.file_meta.TransferSyntaxUID = UID(syntax)


def _compress(dataset: Dataset, frames: NDArray[Any], syntax: str) -> None:
    """Compress the pixels of a data set, losslessly; values keep their sign where the codec knows of it."""
    if syntax == RLELossless:
        dataset.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
        return
    dataset.PixelData = encapsulate([ENCODERS[UID(syntax)](frame) for frame in frames])
    dataset["PixelData"].is_undefined_length = True


def _saved(dataset: Dataset, path: Path) -> Path:
    dataset.save_as(path, enforce_file_format=True)
    return path
